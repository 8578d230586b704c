"""Settings of the inference engines."""

from __future__ import annotations

from dataclasses import dataclass

from ...agents.secrecy import check_addresses, check_arguments
from ...agents.settings import help_of


@dataclass
class EngineConfig:
    """Settings of the engine that plays."""

    engine: str = help_of("who plays: auto, vllm or transformers (in this process)", "auto")
    engine_args: dict | str | None = help_of(
        "more arguments for the vLLM server, checked by its own parser", factory=dict
    )
    engine_dtype: str = help_of(
        "of the served base: auto (the model's own), float32 or bfloat16", "auto"
    )
    server_urls: list[str] = help_of(
        "vLLM servers already running (.../v1); empty starts our own", factory=list
    )
    server_key: str = help_of(
        "environment variable or 0600 file that holds the key of server_urls", ""
    )
    router_url: str = help_of(
        "vllm-router before these servers: it is asked to generate; adapters still go to every"
        " server, and are proven there",
        "",
    )
    endpoints: str = help_of(
        "file or folder of files in which server nodes write where their servers are; see"
        " serve_only",
        "",
    )
    num_servers: int = help_of("endpoints: how many servers to wait for", 1)
    server_host: str = help_of(
        "address that our servers listen on; other nodes reach only another one than this",
        "127.0.0.1",
    )
    server_port: int = help_of("port of our server; 0 takes a free one", 0)
    server_memory: float = help_of(
        "share of the GPU's memory for our server (on a CPU: GiB of KV cache); 0 = a printed"
        " estimate",
        0.0,
    )
    server_devices: str = help_of(
        'CUDA_VISIBLE_DEVICES of our server ("0;1" starts one on each); empty = the trainer\'s', ""
    )
    server_timeout: float = help_of("seconds our server may take to come up", 600.0)
    max_staleness: int = help_of(
        "team versions an episode may be behind when it is learnt from: above 0, later steps are"
        " played while one is learnt",
        0,
    )
    max_model_len: int = help_of(
        "context of our server in tokens; 0 = the model's own, at most 4096", 0
    )
    allow_open_server: bool = help_of("accept servers by URL that answer without a key", False)

    def __post_init__(self) -> None:
        check_addresses(self.server_urls, self.router_url, self.server_key)
        check_arguments(self.engine_args)
