# A size: about 1.6M parameters with a vocabulary of 2,048. Minutes on a CPU.
#   python train.py config/small.py --dataset=mine --out_dir=out-mine
n_layer = 4
n_head = 5
n_embd = 160
block_size = 256
tie_weights = True
batch_size = 8
gradient_accumulation_steps = 1
learning_rate = 3e-3
lr_schedule = 'linear'
warmdown = 0.9
min_lr = 0.0
warmup_iters = 20
max_iters = 400
eval_interval = 100
