"A chat model small enough to compute by hand, and its tokenizer: one token a character, and a few pairs."

import copy

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant {% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789 .,?"
STOP = 2
TURNS = [["where is it?", "and then?"], ["name a bird", "why"], ["hi", "bye"], ["a long line of words to begin with", "x"], ["th", "in"]]


def letters_tokenizer(template=TEMPLATE):
    "One token a character, and a few pairs, so that texts have several tokenisations."
    vocab = {"<u>": 0, "<s>": 1, "</s>": 2} | {x: i for i, x in enumerate(LETTERS, 3)}
    pairs = ["ab", "th", "he", "in"]
    vocab |= {x: len(vocab) + i for i, x in enumerate(pairs)}
    core = Tokenizer(models.BPE(vocab, [tuple(p) for p in pairs], unk_token="<u>"))
    core.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    core.decoder = decoders.Fuse()
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<u>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def tiny_chat(seed=0):
    "A random model of 64 tokens; token 2 ends an answer."
    torch.manual_seed(seed)
    size = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3)
    config = hf.LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=STOP)
    return hf.LlamaForCausalLM(config).eval().requires_grad_(False)


def forbid(model, token):
    "The same model, to which one token is impossible."
    model = copy.deepcopy(model)
    model.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([token]), -torch.inf))
    return model
