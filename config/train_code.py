# A small model of Python code: the sources that are on this machine already. Minutes on a CPU.
#   python data/code/prepare.py          (train.py does this itself)
#   python train.py config/train_code.py
#   python sample.py --out_dir=out-code --start="def read_lines(path):"

out_dir = 'out-code'
dataset = 'code'

# 1.9M parameters with the default vocabulary of 4,096
n_layer = 4
n_head = 5
n_embd = 160
block_size = 256  # a function or two
tie_weights = True  # halves the parameters of the vocabulary

batch_size = 8
# 8 × 256 = 2,048 tokens a step; 600 steps read almost a quarter of the 20 MB, and nothing twice
gradient_accumulation_steps = 1

learning_rate = 3e-3
lr_schedule = 'linear'
warmdown = 0.9
min_lr = 0.0
warmup_iters = 20
max_iters = 600

eval_interval = 100
# 320 of the 2,600 sequences: the whole split would take longer than the steps in between
eval_iters = 40
sample_interval = 200
