"""Settings of the inference engines."""

from __future__ import annotations

from dataclasses import dataclass

from ...agents.settings import Settings, parsed_mapping, setting
from ...agents.text.secrecy import check_addresses, check_arguments


@dataclass
class EngineConfig(Settings):
    """Settings of the inference engine, mixed into a run's settings."""

    engine: str = setting("inference engine: auto, vllm or transformers (in this process)", "auto")
    engine_args: dict | str | None = setting(
        "more arguments for the vLLM server, checked by its own parser", factory=dict
    )
    engine_dtype: str = setting(
        "dtype of the served base: auto (the model's own), float32 or bfloat16", "auto"
    )
    server_urls: list[str] = setting(
        "vLLM servers already running (.../v1); empty starts one here", factory=list
    )
    server_key: str = setting(
        "environment variable or 0600 file that holds the key of server_urls", ""
    )
    router_url: str = setting(
        "vllm-router before these servers: it is asked to generate; adapters still go to every"
        " server, and are verified there",
        "",
    )
    endpoints: str = setting(
        "file or folder of files in which server nodes list their servers; see serve_only", ""
    )
    num_servers: int = setting("endpoints: how many servers to wait for", 1)
    server_host: str = setting(
        "address that servers started here listen on; other nodes cannot reach 127.0.0.1",
        "127.0.0.1",
    )
    server_port: int = setting("port of the server started here; 0 takes a free one", 0)
    server_memory: float = setting(
        "share of the GPU's memory for the server (on a CPU: GiB of KV cache); 0 = a printed"
        " estimate",
        0.0,
    )
    server_devices: str = setting(
        'CUDA_VISIBLE_DEVICES of the server ("0;1" starts one on each); empty = the trainer\'s', ""
    )
    server_timeout: float = setting("seconds a server may take to start", 600.0)
    max_model_len: int = setting(
        "context of the server in tokens; 0 = the model's own, at most 4096", 0
    )
    allow_open_server: bool = setting("accept servers by URL that answer without a key", False)

    def prepare(self) -> None:
        self.engine_args = parsed_mapping("engine_args", self.engine_args)
        check_addresses(self.server_urls, self.router_url, self.server_key)
        check_arguments(self.engine_args)
