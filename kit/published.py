"""Results published for OpenAI's models, for comparison."""

# HellaSwag, all 10,042 validation examples, zero-shot: (acc, acc_norm). "completion" and "harness" are the
# protocols of hellaswag.py. Source: the comments in
# https://github.com/karpathy/build-nanogpt/blob/master/hellaswag.py; for gpt2-medium and gpt2-large,
# play.ipynb of the same repository, whose counts for the other two are up to ten examples lower (0.2945,
# 0.4889).
# None: not published
HELLASWAG_EXAMPLES = 10042
HELLASWAG = {
    "gpt2": {"completion": (0.2859, 0.2955), "harness": (0.2892, 0.3114)},
    "gpt2-medium": {"completion": (None, 0.3752), "harness": (None, None)},
    "gpt2-large": {"completion": (None, 0.4320), "harness": (None, None)},
    "gpt2-xl": {"completion": (0.3842, 0.4893), "harness": (0.4004, 0.5089)},
}

# the same examples, zero-shot, for the GPT-3 of the nearest size: Small, Medium, Large and XL of table H.1,
# https://arxiv.org/abs/2005.14165
GPT3_HELLASWAG = {"gpt2": 0.337, "gpt2-medium": 0.436, "gpt2-large": 0.510, "gpt2-xl": 0.547}

# loss of OpenAI's 124M on FineWeb-Edu's val shard, nats per token. Source: the same play.ipynb
FINEWEB_EDU_LOSS = {"gpt2": 3.2924}
