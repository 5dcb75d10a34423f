"""Where a rendered configuration will run: sockets, folders, the CA bundle. The half that gateway.yaml does not say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files on Envoy's machine: the sidecar's `ca`, and what Envoy shows to the sidecar."""

    ca: PurePosixPath
    certificate: PurePosixPath
    private_key: PurePosixPath


@dataclass(frozen=True, slots=True)
class RemoteSidecar:
    """A sidecar behind TCP (`extproc serve --listen`). `host` must be on its certificate. No `tls`: loopback alone."""

    host: str
    port: int
    tls: ClientTls | None


@dataclass(frozen=True, slots=True)
class Deployment:
    """`run_dir` holds sockets and secret files; `workers` is how many sidecar processes Envoy balances over.

    `ca_bundle` is the file of public CA certificates that providers are checked against.
    """

    run_dir: PurePosixPath
    ca_bundle: PurePosixPath
    workers: int = 1
    journal: PurePosixPath | None = None
    """The file that Envoy keeps of finished requests, where there is one."""
    sidecar: RemoteSidecar | None = None
    """Where the workers are when they have no sockets in `run_dir`; `workers` then does not matter."""

    @property
    def admin_socket(self) -> PurePosixPath:
        return self.run_dir / "envoy-admin.sock"

    @property
    def board(self) -> PurePosixPath:
        """The memory that all of a gateway's processes share."""
        return self.run_dir / "board"

    @property
    def config_dir(self) -> PurePosixPath:
        """Envoy watches this folder; nothing else is written there, so that a change means a change."""
        return self.run_dir / "envoy"

    @property
    def clusters_file(self) -> PurePosixPath:
        return self.config_dir / "clusters.json"

    @property
    def routes_file(self) -> PurePosixPath:
        return self.config_dir / "routes.json"

    @property
    def listeners_file(self) -> PurePosixPath:
        return self.config_dir / "listeners.json"

    @property
    def demo_socket(self) -> PurePosixPath:
        return self.run_dir / "demo.sock"

    @property
    def secrets_dir(self) -> PurePosixPath:
        return self.run_dir / "secrets"

    def worker_socket(self, number: int) -> PurePosixPath:
        return self.run_dir / f"worker-{number}.sock"

    def secret_file(self, secret: str) -> PurePosixPath:
        return self.secrets_dir / f"{secret}.json"


_KNOWN_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def system_ca_bundle() -> Path:
    """The machine's bundle of public CAs, else certifi's (Macs and slim images may have none)."""
    for name in _KNOWN_BUNDLES:
        if Path(name).is_file():
            return Path(name)
    import certifi  # noqa: PLC0415  (only where the machine has no bundle)

    return Path(certifi.where())
