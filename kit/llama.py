"""A GPT with RMSNorm, SwiGLU and rotary positions as a Hugging Face Llama, or with QK-norm as a Qwen3."""

import re

import torch

# the layers of a block, and what they are called in the two classes, which split the stacked ones
BLOCK = {
    "ln_1": ("input_layernorm",), "ln_2": ("post_attention_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"), "mlp.c_proj": ("mlp.down_proj",),
}
ROOT = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
# the fields of a GPTConfig that they can express, besides its size
EXPRESSED = ("norm", "mlp", "position", "qk_norm", "tie_embeddings")


def fits(config):
    """Whether one of the two classes has the norm, MLP, positions and biases of this GPTConfig."""
    llama = (config.norm, config.mlp, config.position) == ("rmsnorm", "swiglu", "rope")
    return llama and not (config.qk_norm and config.bias)  # Qwen3's MLP has no biases


def write(model, directory, end_of_text, padding):
    """Write a GPT that `fits` as a directory for `AutoModelForCausalLM.from_pretrained`.

    Padding rows are left out. end_of_text, padding: ids of the tokenizer.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    c = model.config
    classes = (Qwen3Config, Qwen3ForCausalLM) if c.qk_norm else (LlamaConfig, LlamaForCausalLM)
    make_config, make_model = classes
    theirs = make_model(make_config(
        vocab_size=c.num_tokens, max_position_embeddings=c.block_size, hidden_size=c.n_embd,
        intermediate_size=model.transformer.h[0].mlp.c_proj.in_features, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_head, head_dim=c.n_embd // c.n_head,
        rms_norm_eps=1e-5, attention_bias=c.bias, mlp_bias=c.bias, tie_word_embeddings=c.tie_embeddings,
        bos_token_id=end_of_text, eos_token_id=end_of_text,
    ))
    theirs.generation_config.pad_token_id = padding  # in the config, it would freeze that token's embedding
    state = {name: torch.ones_like(tensor) for name, tensor in theirs.state_dict().items()
             if name.endswith(("q_norm.weight", "k_norm.weight"))}  # our QK-norm has no gain
    for name, tensor in model.state_to_save().items():
        tensor, (name, kind) = tensor.detach().cpu(), name.rsplit(".", 1)
        if name in ROOT:
            state[f"{ROOT[name]}.{kind}"] = tensor[: c.num_tokens] if tensor.dim() == 2 else tensor
        else:
            layer, part = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", name).groups()
            for theirs_name, piece in zip(BLOCK[part], tensor.chunk(len(BLOCK[part]))):
                state[f"model.layers.{layer}.{theirs_name}.{kind}"] = piece
    if c.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    theirs.save_pretrained(directory)
