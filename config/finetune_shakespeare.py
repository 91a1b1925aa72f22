# Fine-tune GPT-2 on Shakespeare: a few minutes on a GPU. --init_from=gpt2 is the smallest model and
# needs less memory.
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py

out_dir = 'out-shakespeare'
dataset = 'shakespeare'
init_from = 'gpt2-xl'  # the largest GPT-2, 1.5 billion parameters

batch_size = 1
gradient_accumulation_steps = 32  # 32 × 1,024 = 32,768 tokens a step; the text has about 302,000
max_iters = 20

optimizer = 'adamw'  # what these weights were trained with
learning_rate = 3e-5  # constant and low: the weights are good already
decay_lr = False
warmup_iters = 0

eval_interval = 5
always_save_checkpoint = False
