"""GPT-2, the whole of it: the decoder-only transformer of "Language Models are Unsupervised Multitask
Learners" (Radford et al., 2019), with OpenAI's parameter names, so its published weights load as they are.

Pre-norm blocks, tanh-GELU, learned positions, and one matrix that both embeds the tokens and predicts them.
Shapes are commented with B = batch, T = time (tokens), C = n_embd, nh = heads, hs = head size,
V = vocab_size.
"""

import math
import re
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# the four models OpenAI published, under the names of the paper and of the Hugging Face hub
GPT2_SIZES = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 350M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1558M
}

# what the tensor cores can do at most, dense 16-bit products with fp32 accumulation, FLOP/s: NVIDIA's
# datasheets. The first name that the device's name contains counts, so the narrower names stand first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "A6000": 155e12,
    "L4": 121e12, "A10G": 70e12, "V100": 125e12, "T4": 65e12,
}

# logits held in memory at a time while the loss is computed: 128 MiB of fp32 on a CPU, 1 GiB on a GPU
LOGITS_AT_ONCE = {"cpu": 2**25, "cuda": 2**28, "mps": 2**26}


@dataclass
class GPTConfig:
    """The shape of a GPT-2; the defaults are the 124M. Raises ValueError for a shape no model can have."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50304  # embedding rows: 50257 padded to a multiple of 128, which GPUs multiply faster
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear layers and LayerNorms, as GPT-2 has it
    num_tokens: int | None = None  # ids the tokenizer knows, the rest is padding; None: at most GPT-2's 50257

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "num_tokens"):
            if name == "num_tokens" and self.num_tokens is None:
                self.num_tokens = min(self.vocab_size, 50257)  # a number by now
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head})")
        if self.num_tokens > self.vocab_size:
            raise ValueError(f"num_tokens ({self.num_tokens}) must not exceed vocab_size ({self.vocab_size})")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and less than 1, not {self.dropout!r}")


class KVCache:
    """The keys and values of the tokens seen so far, for every layer: what one more token attends to."""

    def __init__(self, config, batch_size, device, dtype):
        head_size = config.n_embd // config.n_head
        shape = (2, batch_size, config.n_head, config.block_size, head_size)
        self.kv = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0  # tokens that all layers hold

    def append(self, layer, kv):
        """Store keys and values (2, B, nh, T, hs) behind those held; return all (..., length + T, hs)."""
        T = kv.size(3)
        self.kv[layer].narrow(3, self.length, T).copy_(kv)
        return self.kv[layer].narrow(3, 0, self.length + T)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each token to itself and to those before it."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        # queries, keys and values in one
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, cache=None):
        B, T, C = x.size()
        # queries, keys and values, head by head: (3, B, nh, T, hs)
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)
        if cache is None:
            q, k, v = qkv
        else:
            assert cache.length == 0 or T == 1, (
                "a cache that holds tokens takes one more at a time: no mask is made"
            )
            q, (k, v) = qkv[0], cache.append(self.layer, qkv[1:])
        # the causal mask: each token attends to itself and to those before it. A single query behind a
        # cache sees all.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
            dropout_p=self.dropout if self.training else 0.0,
        )
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers, four times as wide in between, on each token by itself."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.c_proj.is_residual_projection = True
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        x = F.gelu(self.c_fc(x), approximate="tanh")  # as GPT-2 was trained; the exact one differs
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each reading a LayerNorm and adding to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)  # the tokens exchange what they know
        x = x + self.mlp(self.ln_2(x))  # each token thinks it over
        return x


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the logits x @ weight.T, with only `LOGITS_AT_ONCE` of them in memory at a time.

    The loss is the last thing computed, so its gradient needs nothing from later: each slice of logits is
    turned into gradients at once and dropped. Nothing is computed twice. The backward pass scales them in
    place, so it can be taken once only.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):  # (N, C), (V, C), (N,) -> scalar
        device_type = x.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype
        w = weight.to(dtype)
        loss = torch.zeros((), device=x.device)
        dx = torch.empty_like(x, dtype=dtype)
        dw = torch.zeros_like(weight)
        with torch.autocast(device_type, enabled=False):
            for rows in row_slices(x, len(weight)):
                x_slice = x[rows].to(dtype)
                logits = (x_slice @ w.t()).float()  # (n, V)
                log_probs = torch.log_softmax(logits, dim=-1, out=logits)  # in place: it is large
                correct = targets[rows].unsqueeze(-1)  # (n, 1)
                at_correct = log_probs.gather(-1, correct)  # (n, 1)
                loss -= at_correct.sum()
                # d loss / d logits = softmax - one_hot, as a sum: fp16 would lose small values to the
                # 1/N of the mean. Set and not added: compiled in 16 bits, nothing is left to keep in fp32
                dlogits = log_probs.exp_().to(dtype)
                dlogits.scatter_(-1, correct, (at_correct.exp() - 1).to(dtype))
                dx[rows] = (w.t() @ dlogits.t()).t()  # dlogits @ w, which a CPU multiplies more slowly
                if dtype == dw.dtype:
                    dw.addmm_(dlogits.t(), x_slice)  # no second matrix of this size
                else:  # 16-bit sums over many slices would lose digits
                    dw += dlogits.t() @ x_slice
        ctx.save_for_backward(dx, dw)
        ctx.x_dtype = x.dtype
        return loss / len(x)

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        scale = grad / len(dx)
        return dx.mul_(scale).to(ctx.x_dtype), dw.mul_(scale), None


def row_slices(x, vocab_size):
    """Slices of the rows of x (N, C) whose logits are at most LOGITS_AT_ONCE (but 16 rows at least).

    As few and as equal as can be, for each reads all weights, in steps of 16 rows: transposed, as for dx, the
    logits of another number do not begin each line at a multiple of 16 bytes, and a GPU takes longer.
    """
    blocks = max(1, math.ceil(len(x) / 16))
    at_once = max(1, LOGITS_AT_ONCE.get(x.device.type, 2**25) // (16 * vocab_size))
    step = 16 * math.ceil(blocks / math.ceil(blocks / at_once))
    return [slice(start, start + step) for start in range(0, len(x), step)]


class GPT(nn.Module):
    """GPT-2: embeddings, n_layer blocks, a final LayerNorm, and the head that shares the token embedding."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),  # what a token is
                wpe=nn.Embedding(config.block_size, config.n_embd),  # where it stands
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied: https://arxiv.org/abs/1608.05859
        self.apply(self._init_weights)

    def _init_weights(self, module):
        # GPT-2's initialisation: 0.02, and what adds to the residual stream scaled down by the number
        # of additions
        if isinstance(module, nn.Linear):
            std = 0.02
            if hasattr(module, "is_residual_projection"):
                std /= math.sqrt(2 * self.config.n_layer)
            nn.init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def features(self, idx, positions=None, mask=None, cache=None):
        """What the head reads: the final LayerNorm's output, (B, T, C), for token ids idx (B, T).

        positions (B, T) or (T,): where the tokens stand, by default in order behind those in the cache.
        mask (B, 1, T, T) bool: who attends to whom, by default causal. cache: a KVCache, which is filled.
        """
        T = idx.size(1)
        start = cache.length if cache is not None else 0
        assert start + T <= self.config.block_size or positions is not None, (
            f"{start + T} tokens do not fit into a context of {self.config.block_size}"
        )
        if positions is None:
            positions = torch.arange(start, start + T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, mask, cache)
        if cache is not None:
            cache.length += T
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """idx (B, T) token ids -> logits (B, T, V), None;
        with targets (B, T) -> None, mean loss in nats per token."""
        x = self.features(idx)
        if targets is None:
            return self.lm_head(x), None
        return None, self.mean_loss(x.view(-1, x.size(-1)), targets.reshape(-1))

    def mean_loss(self, x, targets):
        """Mean cross-entropy of the targets (N,) given their features (N, C), in nats, and its gradient."""
        if torch.is_grad_enabled():
            return LinearCrossEntropy.apply(x, self.lm_head.weight, targets)
        return self.token_losses(x, targets).mean()

    @torch.no_grad()
    def token_losses(self, x, targets):
        """Cross-entropy of each target (N,) given its features (N, C), in nats, without a gradient: (N,).

        As of a model without padding, which is what an export is.
        """
        losses = torch.empty(len(x), device=x.device)
        for rows in row_slices(x, self.config.vocab_size):
            logits = self.lm_head(x[rows]).float()  # (n, V)
            logits[:, self.config.num_tokens :] = -torch.inf  # no probability is lost to the padding
            log_probs = torch.log_softmax(logits, dim=-1, out=logits)  # in place: it is large
            losses[rows] = -log_probs.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
        return losses

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue each of the prompts idx (B, T) by max_new_tokens tokens: (B, T + max_new_tokens).

        The arguments, and the errors raised, are those of `stream`.
        """
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, top_p, generator))
        return torch.cat([idx, *new], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None,
               with_logits=False):
        """Yield the next token of every prompt in idx (B, T), max_new_tokens times: (B, 1) ids.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest; top_p keeps the likeliest that
        together reach that probability (https://arxiv.org/abs/1904.09751). generator: the torch.Generator to
        draw from. Once the context is full, it goes on from its last half. with_logits: yield pairs, the ids
        and the model's own logits (B, num_tokens) before any of these settings. Raises ValueError for
        settings that mean nothing, and for logits that are not finite.
        """
        check_sampling(idx, max_new_tokens, temperature, top_k, top_p)
        block_size = self.config.block_size
        unread = idx[:, -block_size:]  # (B, T) tokens that the model has not seen yet
        cache = KVCache(self.config, len(idx), idx.device, self.transformer.wte.weight.dtype)
        for _ in range(max_new_tokens):
            if cache.length + unread.size(1) > block_size:
                unread, cache.length = idx[:, -((block_size + 1) // 2) :], 0
            x = self.features(unread, cache=cache)[:, -1]  # (B, C)
            logits = self.lm_head(x)[:, : self.config.num_tokens].float()  # the padding is never sampled
            unread = next_token(logits, temperature, top_k, top_p, generator)
            idx = torch.cat([idx[:, -block_size:], unread], dim=1)
            yield (unread, logits) if with_logits else unread

    def configure_optimizers(self, weight_decay, learning_rate, device_type):
        """AdamW as in the GPT-3 paper: matrices and embeddings decay, biases and LayerNorms do not."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        # one kernel for the whole update, where it exists
        fused = device_type.partition(":")[0] in ("cuda", "mps", "cpu")
        return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=fused)

    def num_params(self, non_embedding=False):
        """Number of parameters, the tied matrix once; non_embedding leaves the positions out, as nanoGPT."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def flops_per_token(self, sequence_length):
        """Training FLOPs per token by the convention of PaLM (appendix B) and nanoGPT: 6 N + 12 L T C.

        N are the weights of the matrix products, the head's among them; attention counts in full, with its
        masked half.
        """
        c = self.config
        matrices = sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and "wpe" not in name)
        return 6 * matrices + 12 * c.n_layer * sequence_length * c.n_embd

    def estimate_mfu(self, tokens_per_second, sequence_length, device_name):
        """Model FLOPs utilisation: the share (0 to 1) of the device's 16-bit peak that training makes use of.

        FLOPs are counted by `flops_per_token`; None where PEAK_FLOPS does not know the device.
        """
        for name, peak in PEAK_FLOPS.items():
            if re.search(rf"\b{name}\b", device_name):  # an L40 is no L4
                return self.flops_per_token(sequence_length) * tokens_per_second / peak
        return None

    def summary(self):
        """The table of parameters, layer by layer, as text."""
        transformer = self.transformer
        parts = [("transformer.wte (= lm_head)", transformer.wte), ("transformer.wpe", transformer.wpe)]
        for i, block in enumerate(transformer.h):
            parts.append((f"transformer.h.{i}", block))
            for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
                parts.append((f"  {name}", block.get_submodule(name)))
        parts.append(("transformer.ln_f", transformer.ln_f))
        lines = [f"{'layer':<28} {'weight':>14} {'parameters':>14}", "-" * 58]
        for name, part in parts:
            shape = str(tuple(part.weight.shape)) if hasattr(part, "weight") else ""
            lines.append(f"{name:<28} {shape:>14} {sum(p.numel() for p in part.parameters()):>14,}")
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        lines += ["-" * 58, f"{'total':<28} {'':>14} {self.num_params():>14,}"]
        lines += [f"{'trainable':<28} {'':>14} {trainable:>14,}"]
        return "\n".join(lines)

    @classmethod
    def from_pretrained(cls, source):
        """A GPT with the weights of "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or a Hugging Face folder.

        Raises ValueError for what is not a GPT-2 as published, OSError where it can't be found or fetched.
        """
        from transformers import AutoConfig, GPT2LMHeadModel

        hf_config = AutoConfig.from_pretrained(source)
        if hf_config.model_type != "gpt2":
            raise ValueError(f"{source} is a {hf_config.model_type}, not a GPT-2")
        as_published = dict(
            activation_function=("gelu_new", "gelu_pytorch_tanh"), layer_norm_epsilon=(1e-5,),
            tie_word_embeddings=(True,), scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
            add_cross_attention=(False,), n_inner=(None, 4 * hf_config.n_embd),
        )
        for name, expected in as_published.items():
            if getattr(hf_config, name) not in expected:
                raise ValueError(f"{source} has {name}={getattr(hf_config, name)!r}, "
                                 f"GPT-2 has {expected[0]!r}")

        shape = dict(n_layer=hf_config.n_layer, n_head=hf_config.n_head, n_embd=hf_config.n_embd)
        config = GPTConfig(hf_config.n_positions, hf_config.vocab_size, **shape)
        theirs, info = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        absent = sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])} - {"lm_head.weight"})
        if absent:  # transformers makes them up
            raise ValueError(f"{source} lacks {', '.join(absent[:3])}, or has it in another shape")
        state = {name: from_hf(name, tensor) for name, tensor in theirs.state_dict().items()}
        return cls.from_state(config, state)

    @classmethod
    def from_state(cls, config, state):
        """The model of `config` and its state dict, in eval mode; the tensors of `state` become its own."""
        layers = sum(name.endswith(".ln_1.weight") for name in state)
        if layers != config.n_layer:  # before a config from a stranger builds a model of any size
            raise ValueError(f"n_layer is {config.n_layer}, but there are weights of {layers} layers")
        with torch.device("meta"):  # nothing is allocated or initialised that the state dict brings anyway
            model = cls(config)
        # files hold the tied matrix once
        state = {"lm_head.weight": state["transformer.wte.weight"], **state}
        model.load_state_dict(state, assign=True)
        model.lm_head.weight = model.transformer.wte.weight  # assigning untied them
        return model.requires_grad_(True).eval()

    def state_to_save(self):
        """The state dict without lm_head.weight, which is transformer.wte.weight."""
        return {name: tensor for name, tensor in self.state_dict().items() if name != "lm_head.weight"}

    def save_pretrained(self, directory):
        """Write a Hugging Face directory for `GPT2LMHeadModel.from_pretrained`, its vocabulary not padded.

        That class always has biases: those of a model without (bias=False) are written as zeros.
        """
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        end_of_text = c.num_tokens - 1
        hf_config = GPT2Config(
            vocab_size=c.num_tokens, n_positions=c.block_size,
            n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout,
            bos_token_id=end_of_text, eos_token_id=end_of_text,
        )
        hf_model = GPT2LMHeadModel(hf_config)
        state = {name: torch.zeros_like(tensor) for name, tensor in hf_model.state_dict().items()
                 if name.endswith(".bias")}
        state |= {name: from_hf(name, tensor.detach().cpu()) for name, tensor in self.state_to_save().items()}
        state["transformer.wte.weight"] = state["transformer.wte.weight"][: c.num_tokens]
        state["lm_head.weight"] = state["transformer.wte.weight"]
        hf_model.load_state_dict(state)
        hf_model.generation_config.pad_token_id = end_of_text  # what generate() takes, with a warning
        hf_model.save_pretrained(directory)


def from_hf(name, tensor):
    """A tensor of Hugging Face's GPT-2 as this model has it, and the other way round: OpenAI's Conv1D is a
    Linear whose weight is stored transposed. attn.c_proj is square, so that no shape would tell."""
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return tensor.t().contiguous() if name.endswith(conv1d) else tensor


def check_sampling(idx, max_new_tokens, temperature, top_k, top_p):
    if idx.dim() != 2 or idx.size(1) == 0:
        raise ValueError(f"a prompt of at least one token is needed, (B, T), not {tuple(idx.shape)}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, it is {max_new_tokens}")
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
        raise ValueError("the model's logits are not finite: its training has diverged")
    if temperature < 1e-6:  # the division below would overflow
        return logits.argmax(dim=-1, keepdim=True)
    logits, ids, top_p = (logits - largest) / temperature, None, top_p or 1
    if top_k or top_p < 1:  # the likeliest first, and no others: a draw from all takes longer
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # the probability of all likelier tokens
        # a smaller top_p may be 0 as a float32: not even the likeliest would stay
        probs = probs.masked_fill(before >= max(top_p, 1e-30), 0.0)
    choice = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
    return choice if ids is None else ids.gather(-1, choice)
