# A small model of the embedded lyrics (or of your own crawl): about 3 minutes on 2 CPU cores.
#   python train.py config/train_darklyrics.py
#   python sample.py --out_dir=out-darklyrics

out_dir = 'out-darklyrics'
dataset = 'darklyrics'

# about 1.6M parameters: as much as half a megabyte of lyrics can teach
n_layer = 4
n_head = 5
n_embd = 160
block_size = 256  # a verse and its refrain

batch_size = 8
gradient_accumulation_steps = 1  # 8 × 256 = 2,048 tokens a step

learning_rate = 1e-2  # small models like high rates, and Muon and QK-norm bear them
lr_schedule = 'linear'
warmdown = 0.6
min_lr = 0.0
warmup_iters = 20
max_iters = 500

eval_interval = 100
sample_interval = 100  # watch it learn to write
