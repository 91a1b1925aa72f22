# A character-level model of Tiny Shakespeare, nanoGPT's first example.
#   python data/shakespeare_char/prepare.py
#   python train.py config/train_shakespeare_char.py
# On a CPU, smaller (seconds to nanoGPT's loss of 1.88):
#   python train.py config/train_shakespeare_char.py config/tiny.py

out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'

# about 11M parameters
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2  # the text is read many times

batch_size = 64
gradient_accumulation_steps = 1

learning_rate = 3e-3
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 100
max_iters = 2000
beta2 = 0.99  # few tokens a step: average over more steps

eval_interval = 250
patience = 4  # it overfits in the end; best.pt keeps the best
