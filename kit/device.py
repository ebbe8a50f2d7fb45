"""The device of a run: which one, its settings, compilation, precision, and its peak speed."""

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.attention
from torch.overrides import TorchFunctionMode

from kit.files import UserError, out_of_memory, warn_once
from kit.packed import onednn_is_faster

# dense 16-bit FLOP/s of the tensor cores with fp32 accumulation, from NVIDIA's datasheets. The first name
# contained in the device's name counts, so narrower names come first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12, "H200": 989e12,
    "GH200": 989e12, "B200": 2250e12, "B300": 2250e12, "GB200": 2500e12, "GB300": 2500e12, "A100": 312e12,
    "L40S": 362e12, "RTX PRO 6000 Blackwell Workstation": 504e12, "RTX 5090": 209e12, "RTX 4090": 165e12,
    "RTX 3090": 71e12, "A6000": 155e12, "L4": 121e12, "A10G": 70e12, "V100": 125e12, "T4": 65e12,
}

# options of torch.compile on a CPU: compute tanh by exp, which is three times as fast and, in GELU's
# 1 + tanh, as accurate
INDUCTOR_OPTIONS = {"cpp.use_decompose_tanh": True}
PARTITIONER_CONFIG = "torch._functorch.config"  # a private name: without it, training takes more memory


def peak_flops(device_name):
    """The peak 16-bit FLOP/s of a device by its name; None if it is not in PEAK_FLOPS, or a slice (MIG)."""
    for name, peak in PEAK_FLOPS.items():
        # an L40 must not match L4
        if re.search(rf"\b{name}\b", device_name) and not re.search(r"\bMIG\b", device_name):
            return peak
    return None


class NoRandomWeights(TorchFunctionMode):
    """Modules made in this context skip normal_: its first call on the meta device takes 1.5 s, an import."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def pick_device(name=None):
    """The device called `name`, or the best one here: "cuda", "mps" or "cpu". Raises UserError."""
    available = [kind for kind in ("cuda", "mps") if getattr(torch, kind).is_available()] + ["cpu"]
    name = name or available[0]
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if kind not in available or (":" in name and index not in map(str, range(count))):
        raise UserError(f"--device {name}: not available on this machine, which has {', '.join(available)}")
    return name


def type_of(device):
    """"cuda", "mps" or "cpu" for a device name such as "cuda:0"."""
    return device.partition(":")[0]


@functools.cache
def name_of(device):
    """The product name of the GPU or processor, if it is known."""
    if type_of(device) == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, TypeError):  # Linux
        return re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)[1]
    return platform.processor() or platform.machine()


def machine(device):
    """Facts about this machine and its software, for records of benchmarks: {name: value}."""
    dtype = torch.bfloat16 if type_of(device) == "cuda" else torch.float32
    facts = dict(time=time.strftime("%Y-%m-%dT%H:%M:%S%z"), python=platform.python_version(),
                 torch=torch.__version__, transformers=importlib.metadata.version("transformers"),
                 cores=os.cpu_count(), device=name_of(device),
                 attention=attention_backend(device, dtype, head_size=64))
    if type_of(device) == "cuda":
        driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        facts["cudnn"] = torch.backends.cudnn.version()
        with contextlib.suppress(OSError):  # some containers lack nvidia-smi
            facts["driver"] = subprocess.run(driver, capture_output=True, text=True).stdout.strip()
    return facts


def to_device(tensor, device):
    """Copy a CPU tensor to a device. CUDA copies it from pinned memory, without waiting for queued work."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def attention_backend(device, dtype, head_size):
    """The kernel that torch chooses for causal attention in training, such as "FLASH_ATTENTION", or None.

    dtype: a torch.dtype. head_size: numbers per head. None: unknown.
    """
    choose = getattr(torch, "_fused_sdp_choice", None)  # a private name
    if choose is None or type_of(device) == "mps":
        return None
    q = torch.empty(1, 1, 128, head_size, device=device, dtype=dtype, requires_grad=True)
    return torch.nn.attention.SDPBackend(choose(q, q, q, is_causal=True)).name


def memory_of(device):
    """The memory of an NVIDIA GPU, in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


def peak_memory(device):
    """The most memory that this process has used so far, in bytes: of its NVIDIA GPU, or of the machine."""
    if type_of(device) == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def tune(device, training=False):
    """Process-wide settings for speed and reproducibility. A script calls this before its first matmul.

    training: also let oneDNN run the CPU's fp32 matmuls where it is faster. Evaluation and sampling pack
    their weights instead (kit/packed.py).
    """
    # glibc returns every large tensor to the kernel when it is freed, and the next step pays for its pages
    # again. Never use mmap (-4), never trim the heap (-1): malloc.h. Other C libraries lack the call. A user
    # who needs the memory more than the speed sets glibc's own variables
    if not {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"} & set(os.environ):
        with contextlib.suppress(AttributeError, TypeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0), libc.mallopt(-1, -1)
    # MKL picks its vector kernels at the first call. If two threads make that call at once they can get
    # different kernels, whose results differ in the last bits: let one thread make it
    torch.zeros(64).exp()
    if training:
        # every optimizer imports the compiler, which fails if it can't make its cache directory
        name = "TORCHINDUCTOR_CACHE_DIR"
        try:
            os.makedirs(os.environ.get(name) or ".", exist_ok=True)
        except OSError as error:
            os.environ[name] = tempfile.mkdtemp()
            warn_once(f"{name} can't be used ({error}): using {os.environ[name]}")
    if type_of(device) == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for matmuls that stay in fp32
        if not training:
            torch.backends.cuda.enable_cudnn_sdp(False)  # see without_cudnn_attention
    elif training and onednn_is_faster():
        # torch uses oneDNN for fp32 matmuls at "medium", which also allows bf16 inside. Only AMX would make
        # use of that; the test shows whether fp32 stays fp32
        torch.set_float32_matmul_precision("medium")
        x = torch.full((256, 256), 1 + 2**-23)
        if not torch.equal(x @ torch.eye(256), x):
            torch.set_float32_matmul_precision("highest")


@contextlib.contextmanager
def without_cudnn_attention():
    """For HellaSwag and sampling: cuDNN's attention makes a plan for each new shape, which takes time."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def compiles_by_default(device):
    """Whether to compile a model on a device if the user does not say.

    Not on Apple's GPUs: compiled LayerNorm was silently wrong there before torch 2.13
    (https://github.com/pytorch/pytorch/issues/191976), and a GPT's loss became NaN (issue 171764).
    """
    return type_of(device) != "mps"


def compile_model(model, device, mode=None):
    """torch.compile a GPT; compilation itself happens at the first call. mode: torch.compile's."""
    if type_of(device) != "cpu":
        return torch.compile(model, mode=mode)
    # saves memory: recompute the outputs of LayerNorm and GELU in the backward pass instead of keeping them,
    # and keep the loss out of the graph, where Inductor would hold all slices of the logits at once
    with contextlib.suppress(ImportError):
        importlib.import_module(PARTITIONER_CONFIG).ban_recompute_materialized_backward = False
    model.uncompiled_loss = torch.compiler.disable(model.mean_loss)
    # the same bits every time: threads would add up the gradients of one embedding row in any order
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    if mode is not None:
        return torch.compile(model, mode=mode)
    try:
        return torch.compile(model, options=INDUCTOR_OPTIONS)
    except RuntimeError:  # a version without this option
        return torch.compile(model)


def fits_into_memory(model, batch, precision, device, missing):
    """Whether a training step of this batch (inputs, targets) fits into a GPU's memory, by trying it.

    Uncompiled: compiled, it takes less. missing: how many tensors per parameter will be allocated later.
    """
    later = x = y = loss = None
    try:
        later = [torch.empty_like(p) for p in model.parameters() for _ in range(missing)]
        x, y = (to_device(tokens, device) for tokens in batch)
        with precision.autocast:
            _, loss = model(x, y)
        loss.backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        model.zero_grad()
        del later, x, y, loss
        if type_of(device) == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)  # the peak that is reported is training's


class Precision:
    """The dtype of matmuls in training, with its autocast context and gradient scaler.

    name: "bfloat16", "float16" or "float32". Without one it is bfloat16 on CUDA GPUs that have it, float16
    on other CUDA GPUs, float32 elsewhere.
    """

    def __init__(self, device, name=None):
        device_type = type_of(device)
        if name is None and device_type == "cuda":
            name = "bfloat16" if torch.cuda.is_bf16_supported(False) else "float16"
        self.name = name or "float32"
        self.autocast = contextlib.nullcontext()
        if self.name != "float32":
            self.autocast = torch.autocast(device_type, dtype=getattr(torch, self.name))
        # small fp16 gradients would underflow without a scale
        self.scaler = torch.amp.GradScaler(device_type, enabled=self.name == "float16")
