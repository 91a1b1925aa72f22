# A small model of the embedded lyrics (or of your own crawl): about a minute on 2 CPU cores (two
# minutes without bfloat16).
#   python train.py config/train_darklyrics.py
#   python sample.py --out_dir=out-darklyrics

out_dir = 'out-darklyrics'
dataset = 'darklyrics'

# 1.9M parameters with the default vocabulary of 4,096: enough for half a megabyte of lyrics
n_layer = 4
n_head = 5
n_embd = 160
block_size = 256  # a verse and its chorus
tie_weights = True  # halves the parameters of the vocabulary, and the model overfits later

batch_size = 8
gradient_accumulation_steps = 1  # 8 × 256 = 2,048 tokens a step

learning_rate = 3e-3
lr_schedule = 'linear'
warmdown = 0.9
min_lr = 0.0
warmup_iters = 20
max_iters = 300

eval_interval = 50
sample_interval = 100  # watch the samples improve
