"""Does the process really hold less? Resident memory after 2,500 tokens of the real model, dense against compressed."""

import json
import os
import subprocess
import sys

PROGRAM = """
import ctypes, json, sys
import torch, longwave
from longwave.evals.data import pydoc_haystack
from longwave.frame import cache_argument

def resident():
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024

model, tokenizer = longwave.load("smollm2-q4", dtype=torch.float32)
ids = tokenizer(pydoc_haystack(), return_tensors="pt", verbose=False).input_ids[:, :2500]

def empty():
    return longwave.cache(model, sys.argv[1], **({"budget": 0.25} if sys.argv[1] == "fourier" else {}))

def read(memory, tokens):
    with torch.no_grad():
        for start in range(0, tokens, 500):  # in chunks, as a machine short of memory would
            model(ids[:, start : start + 500], **cache_argument(model, memory), use_cache=True, logits_to_keep=1)
    return memory

memory = read(empty(), 1000)  # weights paged in, buffers of the libraries made, kernels loaded: of packed pages, too
with torch.no_grad():
    model(ids[:, 1000:1001], **cache_argument(model, memory), use_cache=True)
del memory
before = resident()
memory = read(empty(), 2500)
grown = resident() - before
report = memory.report()
print(json.dumps({"grown": grown, "nbytes": report.nbytes, "dense_nbytes": report.dense_nbytes}))
"""


def measure(method):
    # every larger block straight from the system, so that what is freed is seen to be freed
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, method], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_resident_memory_falls_by_what_the_report_claims():
    dense, fourier = measure("dense"), measure("fourier")
    claimed = dense["nbytes"] - fourier["nbytes"]
    assert claimed > 65e6  # 115 MB dense at 2,500 tokens
    assert abs((dense["grown"] - fourier["grown"]) - claimed) < 0.1 * claimed
    assert abs(fourier["grown"] - fourier["nbytes"]) < 0.1 * dense["nbytes"]
