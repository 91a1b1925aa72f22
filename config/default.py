# A size: about 87M parameters with a vocabulary of 4,096. An evening on one GPU, with a corpus of
# 100 MB or more.
#   python train.py config/default.py --dataset=mine --out_dir=out-mine
n_layer = 12
n_head = 12
n_embd = 768
n_kv_head = 4  # grouped-query attention: a smaller KV cache
n_ff = 2240
block_size = 1024
batch_size = 16
gradient_accumulation_steps = 8  # 131,072 tokens a step
learning_rate = 1e-3
lr_schedule = 'linear'
min_lr = 0.0
warmup_iters = 200
max_iters = 10000
eval_interval = 500
