"Random causal models of many families, small enough to compute by hand."

import torch
import transformers as hf


def tiny_lm(kind, seed=0, layers=2, window=4):
    "(model, None): a random model with random gains, without a tokenizer."
    torch.manual_seed(seed)
    size = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, initializer_range=0.3)
    heads = dict(num_attention_heads=4, num_key_value_heads=2)
    local = dict(sliding_window=window, layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"])
    if kind == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(**size, **heads))
    elif kind == "qwen2":
        model = hf.Qwen2ForCausalLM(hf.Qwen2Config(**size, **heads))
    elif kind == "qwen3":
        model = hf.Qwen3ForCausalLM(hf.Qwen3Config(**size, **heads, head_dim=16))
    elif kind == "mistral":
        model = hf.MistralForCausalLM(hf.MistralConfig(**size, **heads, sliding_window=window))
    elif kind == "gemma3":
        model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**size, **heads, **local, head_dim=16, query_pre_attn_scalar=20))
    elif kind == "gemma2":
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**size, **heads, **local, head_dim=16, attn_logit_softcapping=1.0))
    elif kind == "neox":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**size, num_attention_heads=4))
    elif kind == "gpt2":
        ends = dict(n_positions=64, bos_token_id=0, eos_token_id=0, initializer_range=0.3)
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=layers, n_head=4, **ends))
    elif kind == "bloom":
        model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=layers, n_head=4))
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.weight.data += 0.3 * torch.randn(module.weight.shape)
    return model.eval(), None
