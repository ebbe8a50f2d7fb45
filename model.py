"""GPT-2: the decoder-only transformer of "Language Models are Unsupervised Multitask Learners" (Radford et
al., 2019). Parameters have the names of Hugging Face's GPT-2; kit/huggingface.py loads the published weights.

Pre-norm blocks, tanh-GELU, learned positions, and one matrix that both embeds and predicts the tokens. The
fields of GPTConfig can replace these parts by others, which are in kit/variants.py.
Shapes in comments: B = batch, T = time (tokens), C = n_embd, nh = heads, hs = head size, V = vocab_size.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kit import huggingface, optim, variants
from kit.device import NoRandomWeights, peak_flops
from kit.loss import LinearCrossEntropy, mean_of_counted, row_slices, split_ignored

# the four models that OpenAI published, by their names on the Hugging Face hub
GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M, usually called 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}
GPT2_TOKENS = 50257  # ids of GPT-2's tokenizer: 256 bytes, 50,000 merges and <|endoftext|>


@dataclass
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M. Raises ValueError for an impossible shape."""

    block_size: int = 1024  # longest context, in tokens
    vocab_size: int = 50304  # embedding rows: 50257 padded to a multiple of 128, for faster matmuls on GPUs
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in linear layers and LayerNorms, as in GPT-2
    num_tokens: int | None = None  # ids of the tokenizer (None: GPT-2's); further rows are padding
    gelu: str = "tanh"  # approximation of GELU: GPT-2's, or "none" (exact), as in nanoGPT and Cerebras-GPT
    # parts in kit/variants.py; the defaults are GPT-2's own:
    mlp: str = "gelu"  # or "swiglu", "relu2"
    norm: str = "layernorm"  # or "rmsnorm"
    position: str = "learned"  # or "rope": rotary
    qk_norm: bool = False  # normalize queries and keys
    tie_embeddings: bool = True  # one matrix embeds and predicts the tokens
    logit_softcap: float = 0.0  # soft-cap the logits at +-this value, by tanh; 0: off
    value_residual: bool = False  # mix the first layer's values into those of later layers
    embedding_norm: bool = False  # a norm after the embedding
    x0_shortcut: bool = False  # mix the embedded tokens into the input of each block
    zero_init: bool = False  # blocks and an untied head output 0 at first (https://arxiv.org/abs/2203.03466)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "num_tokens"):
            value = getattr(self, name)
            if name == "num_tokens" and value is None:
                value = self.num_tokens = min(self.vocab_size, GPT2_TOKENS)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.num_tokens > self.vocab_size:
            raise ValueError(f"num_tokens ({self.num_tokens}) must not exceed vocab_size ({self.vocab_size})")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")
        variants.check(self)


class KVCache:
    """The keys and values of the tokens read so far, for every layer: the next token attends to them."""

    def __init__(self, config, batch_size):
        self.shape = 2, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head
        self.kv = [None] * config.n_layer
        self.length = 0  # tokens stored in every layer

    def append(self, layer, k, v):
        """Append a layer's keys and values (B, nh, T, hs); return all, (B, nh, length + T, hs) each."""
        if self.kv[layer] is None:
            self.kv[layer] = k.new_empty(self.shape)  # in the dtype of k: 16 bits under autocast
        keys, values = self.kv[layer].narrow(3, 0, self.length + k.size(2))
        keys[:, :, self.length :], values[:, :, self.length :] = k, v
        return keys, values


class CausalSelfAttention(nn.Module):
    """Multi-head attention: each token attends to itself and to the tokens before it."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        # queries, keys and values of all heads in one matmul
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True
        self.resid_dropout = nn.Dropout(config.dropout)
        self.adapt = variants.adapt_heads(config, layer)  # QK-norm, rotary positions, value residual

    def forward(self, x, mask=None, cache=None, shared=None):
        B, T, C = x.size()
        # split into queries, keys and values, and into heads: (B, nh, T, hs) each
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if self.adapt is not None:
            q, k, v = self.adapt(q, k, v, shared)
        if cache is not None:
            assert cache.length == 0 or T == 1, (
                "after the prompt, a KV cache takes one token at a time: there is no mask for several"
            )
            k, v = cache.append(self.layer, k, v)
        # is_causal applies the causal mask. A single token after cached ones attends to all, without a mask
        is_causal = mask is None and (cache is None or cache.length == 0)
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with an activation between them, applied to each token separately."""

    def __init__(self, config):
        super().__init__()
        outputs, inputs = variants.mlp_widths(config)  # GPT-2: 4 C for both
        self.c_fc = nn.Linear(config.n_embd, outputs, bias=config.bias)
        self.activation = variants.activation(config)  # GPT-2: GELU, approximated by tanh
        self.c_proj = nn.Linear(inputs, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    """One layer: attention, then the MLP. Each reads the normalized residual stream and adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.shortcut = variants.Shortcut() if config.x0_shortcut else None
        self.ln_1 = variants.norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = variants.norm(config)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None, shared=None, recompute=False):
        if recompute:  # in the backward pass, to keep only x until then
            return checkpoint(self.forward, x, mask, cache, shared, use_reentrant=False)
        if self.shortcut is not None:
            x = self.shortcut(x, shared.x0)
        x = x + self.attn(self.ln_1(x), mask, cache, shared)  # moves information between tokens
        x = x + self.mlp(self.ln_2(x))  # works on each token separately
        return x


class GPT(nn.Module):
    """GPT-2: embeddings, n_layer blocks, a final LayerNorm, and a head that shares the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # keep only the blocks' inputs for the backward pass, which then computes the blocks again
        self.checkpoint_activations = False
        self.uncompiled_loss = None  # or a mean_loss outside torch.compile's graph: kit/device.py
        self.transformer = transformer = nn.ModuleDict()
        transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)  # of tokens
        if config.position == "learned":
            transformer.wpe = nn.Embedding(config.block_size, config.n_embd)  # of positions
        if config.embedding_norm:
            transformer.ln_e = variants.norm(config)
        transformer.drop = nn.Dropout(config.dropout)
        transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        transformer.ln_f = variants.norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            transformer.wte.weight = self.lm_head.weight  # https://arxiv.org/abs/1608.05859
        self.apply(self._init_weights)

    def _init_weights(self, module):
        # GPT-2's initialization: standard deviation 0.02; layers that add to the residual stream are scaled
        # down by the square root of the number of additions
        if isinstance(module, nn.Linear):
            std = 0.02
            if hasattr(module, "is_residual_projection"):
                std = 0.0 if self.config.zero_init else std / math.sqrt(2 * self.config.n_layer)
            elif module is self.lm_head and self.config.zero_init and not self.config.tie_embeddings:
                std = 0.0
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def features(self, idx, positions=None, mask=None, cache=None):
        """The output of the final norm, (B, T, C), for token ids idx (B, T). The head reads it.

        positions (B, T) or (T,): of the tokens; by default they continue after the cached tokens.
        mask (B, 1, T, T) bool: which tokens attend to which; by default causal.
        cache: a KVCache, to which the tokens are appended.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        assert start + T <= self.config.block_size or positions is not None, (
            f"{start + T} tokens exceed the context of {self.config.block_size}"
        )
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx)  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.transformer.wpe(positions)
        if self.config.embedding_norm:
            x = self.transformer.ln_e(x)
        x = self.transformer.drop(x)
        shared = variants.share(self.config, positions, x)
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.transformer.h:
            x = block(x, mask, cache, shared, recompute)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def logits(self, x, weight=None):
        """Features (..., C) to logits (..., V): the one place that applies the head.

        weight (V, C): instead of the head's own, for example a copy in 16 bits.
        """
        logits = self.lm_head(x) if weight is None else F.linear(x, weight)
        return variants.softcap(logits, self.config.logit_softcap) if self.config.logit_softcap else logits

    def loss_logits(self, x, weight=None):
        """`logits` of (N, C) in fp32, where the padding of the vocabulary gets no probability.

        Thus the loss equals that of an exported model, which has no padding.
        """
        logits = self.logits(x, weight).float()
        logits[:, self.config.num_tokens :] = -torch.inf
        return logits

    def forward(self, idx, targets=None):
        """Token ids idx (B, T) -> logits (B, T, V), None.

        With targets (B, T) -> None, mean loss in nats per token. Targets of -100 or -1 do not count.
        """
        x = self.features(idx)  # (B, T, C)
        if targets is None:
            return self.logits(x), None
        mean_loss = self.uncompiled_loss or self.mean_loss
        return None, mean_loss(x.view(-1, x.size(-1)), targets.reshape(-1))

    def mean_loss(self, x, targets):
        """Mean cross-entropy, in nats, of the targets (N,) given their features (N, C)."""
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(x, self.lm_head.weight, targets, self.loss_logits,
                                            self.config.logit_softcap)
        return mean_of_counted(self.token_losses(x, targets).mean(), split_ignored(targets)[0])

    @torch.no_grad()
    def token_losses(self, x, targets):
        """Cross-entropy of each target (N,) given its features (N, C), in nats: (N,). No gradient.

        It is 0 for targets of -100 and -1.
        """
        losses = torch.empty(len(x), device=x.device)
        counts, targets = split_ignored(targets)
        for rows in row_slices(x, self.config.vocab_size):
            logits = self.loss_logits(x[rows])  # (n, V)
            log_probs = torch.log_softmax(logits, dim=-1, out=logits)  # in place: it is large
            losses[rows] = -log_probs.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
        return losses.where(counts, 0)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue each of the prompts idx (B, T) by max_new_tokens tokens: (B, T + max_new_tokens).

        Arguments and errors as in `stream`.
        """
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator))
        return torch.cat([idx, *new], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
               with_logits=False):
        """Yield the next token of every prompt in idx (B, T), max_new_tokens times: (B, 1) ids.

        temperature 0 always takes the most likely token. top_k keeps the k most likely tokens; top_p keeps
        the most likely ones that together reach that probability (https://arxiv.org/abs/1904.09751).
        generator: the torch.Generator to draw from. When the context is full, the model rereads the last half
        of it and continues. with_logits: yield (ids, logits), with logits (B, num_tokens) from before
        temperature, top_k and top_p. Raises ValueError for invalid settings, or if logits are not finite.
        """
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p)
        block_size = self.config.block_size
        unread = idx[:, -block_size:]  # (B, T) tokens that the model has not read yet
        cache = KVCache(self.config, len(idx))
        for _ in range(max_new_tokens):
            if cache.length + unread.size(1) > block_size:
                unread, cache.length = idx[:, -((block_size + 1) // 2) :], 0
            x = self.features(unread, cache=cache)[:, -1]  # (B, C)
            logits = self.logits(x)[:, : self.config.num_tokens].float()  # the padding is never sampled
            unread = next_token(logits, temperature, top_k, top_p, generator)
            idx = torch.cat([idx[:, -block_size:], unread], dim=1)
            yield (unread, logits) if with_logits else unread

    def configure_optimizers(self, weight_decay, learning_rate, device_type, optimizer="adamw", **settings):
        """AdamW as in the GPT-3 paper: weight decay for matrices and embeddings, not for biases and norms.

        optimizer="muon": Muon for the matrices of the blocks, AdamW for the rest. settings: of `optim.make`.
        """
        return optim.make(self, weight_decay, learning_rate, device_type, optimizer, **settings)

    def num_params(self, non_embedding=False):
        """Number of parameters; a tied matrix counts once. non_embedding: without positions, like nanoGPT."""
        return sum(p.numel() for name, p in self.named_parameters() if not (non_embedding and "wpe" in name))

    def flops_per_token(self, sequence_length):
        """Training FLOPs per token by the convention of PaLM (appendix B) and nanoGPT: 6 N + 12 L T C.

        N counts the weights of all matmuls, the head's included. Attention counts in full, although half of
        it is masked.
        """
        c = self.config
        matmuls = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * matmuls + 12 * c.n_layer * sequence_length * c.n_embd

    def estimate_mfu(self, tokens_per_second, sequence_length, device_name):
        """Model FLOPs utilization: training FLOP/s as a fraction (0 to 1) of the device's 16-bit peak.

        FLOPs as in `flops_per_token`. None if the device's peak is unknown.
        """
        peak = peak_flops(device_name)
        return peak and self.flops_per_token(sequence_length) * tokens_per_second / peak

    def summary(self):
        """A table of the parameters, layer by layer, as text."""
        lines = [f"{'layer':<28} {'weight':>14} {'parameters':>14}", "-" * 58]
        for name, module in self.named_modules():
            parameters = list(module.parameters(recurse=isinstance(module, Block)))
            if not parameters or module is self.lm_head and self.config.tie_embeddings:
                continue
            if module is self.transformer.wte and self.config.tie_embeddings:
                name += " (= lm_head)"
            name = re.sub(r"transformer\.h\.\d+\.", "  ", name)
            shape = "" if isinstance(module, Block) else str(tuple(parameters[0].shape))
            lines.append(f"{name:<28} {shape:>14} {sum(p.numel() for p in parameters):>14,}")
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        lines += ["-" * 58, f"{'total':<28} {'':>14} {self.num_params():>14,}"]
        lines += [f"{'trainable':<28} {'':>14} {trainable:>14,}"]
        return "\n".join(lines)

    @classmethod
    def from_pretrained(cls, source):
        """The model of "gpt2", ..., "gpt2-xl", another GPT-2 of the hub, or a Hugging Face directory.

        Raises ValueError if it is not found or not a GPT-2 as published, OSError for unreadable files.
        """
        shape, state = huggingface.read_gpt2(source)
        return cls.from_state(GPTConfig(**shape), state)

    @classmethod
    def from_state(cls, config, state):
        """The model of `config` and a state dict, in eval mode. It uses the tensors of `state`, no copies."""
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.h.")})
        if layers != config.n_layer:  # an absurd n_layer must fail before the model is built
            raise ValueError(f"n_layer is {config.n_layer}, but there are weights of {layers} layers")
        # allocate and initialize nothing: the state dict has all tensors
        with torch.device("meta"), NoRandomWeights():
            model = cls(config)
        if config.tie_embeddings:  # files store the tied matrix once
            state = {"lm_head.weight": state["transformer.wte.weight"], **state}
        model.load_state_dict(state, assign=True)
        if config.tie_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model.requires_grad_(True).eval()

    def state_to_save(self):
        """The state dict, without lm_head.weight where that is the same tensor as transformer.wte.weight."""
        state = self.state_dict()
        return {name: state[name] for name in state
                if name != "lm_head.weight" or not self.config.tie_embeddings}

    def save_pretrained(self, directory, end_of_text=None, padding=None):
        """Write a Hugging Face directory for `AutoModelForCausalLM.from_pretrained`, without padding rows.

        end_of_text: an id (default: the tokenizer's last). padding: an id (default: end_of_text). Raises
        UserError for variants that transformers has no class for.
        """
        huggingface.write(self, directory, end_of_text, padding)


def check_sampling(idx, max_new_tokens, temperature, top_k, top_p):
    """Raise ValueError for invalid arguments of `GPT.stream`."""
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"the prompt must have at least one token: (B, T), not {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be more than 0 and at most 1, not {top_p}")


def next_token(logits, temperature, top_k, top_p, generator):
    """Draw one id from each row of logits (B, V): (B, 1)."""
    largest = logits.amax(dim=-1, keepdim=True)  # (B, 1)
    if not largest.isfinite().all():
        raise ValueError("the model's logits are not finite: its training diverged")
    if temperature < 1e-6:  # the division below would overflow
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids, top_p = (logits - largest) / temperature, None, top_p or 1
    if top_k or top_p < 1:  # sort for top_p; with top_k, a draw from k tokens is also faster
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # the probability of all more likely tokens
        # a tiny top_p could become 0 in float32 and would then drop even the most likely token
        probs = probs.masked_fill(before >= max(top_p, 1e-30), 0.0)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
    return choice if ids is None else ids.gather(-1, choice)
