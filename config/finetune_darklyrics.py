# Fine-tune GPT-2 on the lyrics: it brings the English, your songs bring the manner.
#   python data/darklyrics/prepare.py --tokenizer=gpt2 --out_dir=data/darklyrics_gpt2     (train.py does this itself)
#   python train.py config/finetune_darklyrics.py
# To fine-tune a model of your own instead: --init_from=out-mine --dataset=other --prepare= (a dataset made with --tokenizer=out-mine/tokenizer.json).

out_dir = 'out-darklyrics-gpt2'
dataset = 'darklyrics_gpt2'
prepare = 'data/darklyrics/prepare.py --tokenizer=gpt2 --out_dir=data/darklyrics_gpt2'
init_from = 'gpt2'  # 124M parameters

block_size = 512  # most songs fit whole, and it halves the memory
batch_size = 4
gradient_accumulation_steps = 4  # 4 × 4 × 512 = 8,192 tokens a step
max_iters = 100
dropout = 0.1

optimizer = 'adamw'
learning_rate = 1e-4
warmup_iters = 10

eval_interval = 20
patience = 2  # a big model knows a small corpus by heart soon
sample_interval = 20
