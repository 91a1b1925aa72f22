# GPT-2's size and data: 124M-scale on OpenWebText, for a node of 8 GPUs.
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = 'out-gpt2'
dataset = 'openwebtext'

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
tie_weights = True  # as in GPT-2: 124M parameters

batch_size = 12
# 12 × 1,024 × 40 = 491,520 tokens a step, divided among all GPUs
gradient_accumulation_steps = 5 * 8

learning_rate = 6e-4
warmup_iters = 2000
max_iters = 600000  # 300 billion tokens; a tenth already gives a good model
weight_decay = 1e-1

eval_interval = 1000
eval_iters = 200  # about 2,400 sequences of the validation split, the same ones every time
log_interval = 10

wandb_log = False  # True logs to Weights & Biases
wandb_project = 'owt'
wandb_run_name = 'gpt2-124M'
