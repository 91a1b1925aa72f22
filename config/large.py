# A size: about 350M parameters with a vocabulary of 16,384. For several GPUs (or one, and patience)
# and a gigabyte of text.
#   torchrun --standalone --nproc_per_node=8 train.py config/large.py \
#       --dataset=mine --out_dir=out-mine
n_layer = 24
n_head = 16
n_embd = 1024
n_kv_head = 8
n_ff = 3264
block_size = 1024
batch_size = 8
gradient_accumulation_steps = 5 * 8  # 327,680 tokens a step
learning_rate = 6e-4
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 500
max_iters = 30000
eval_interval = 1000
