# Fine-tune GPT-2 on the lyrics: it knows English, and learns the style of your songs.
#   python train.py config/finetune_darklyrics.py
# train.py prepares the dataset itself, as this command does:
#   python data/darklyrics/prepare.py --tokenizer=gpt2 --out_dir=data/darklyrics_gpt2
# To fine-tune your own model on a dataset made with --tokenizer=out-mine/tokenizer.json:
#   --init_from=out-mine --dataset=other --prepare=

out_dir = 'out-darklyrics-gpt2'
dataset = 'darklyrics_gpt2'
prepare = 'data/darklyrics/prepare.py --tokenizer=gpt2 --out_dir=data/darklyrics_gpt2'
init_from = 'gpt2'  # 124M parameters

block_size = 512  # most songs fit into it, and it halves the memory
batch_size = 4
gradient_accumulation_steps = 4  # 4 × 4 × 512 = 8,192 tokens a step
max_iters = 100
dropout = 0.1

optimizer = 'adamw'
learning_rate = 1e-4
warmup_iters = 10

eval_interval = 20
patience = 2  # a large model overfits a small corpus soon
sample_interval = 20
