"""Where the server listens: Unix sockets, IPv6, TLS and certificates that change while it runs."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.running_server import RunningServer, running_server
from tests.server.fake_serve import COMMAND


def until(condition: Callable[[], bool]) -> None:
    """Ask again and again; the test's own time limit ends it."""
    asked = threading.Event()
    for _ in range(2000):
        if condition():
            return
        asked.wait(0.01)
    pytest.fail("it never came true")


def start_fails(*arguments: str) -> str:
    """The last line of a server that does not start."""
    server = RunningServer(arguments, command=COMMAND)
    assert server.wait_ended() == 1
    return server.lines[-1]


class Authority:
    """Signs certificates for 127.0.0.1, and writes them where a server finds them."""

    def __init__(self, folder: Path) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.certfile = folder / "authority.pem"
        certificate = self._sign(self._name, self._key.public_key(), 1, is_authority=True)
        self.certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def write(self, folder: Path, serial: int) -> tuple[Path, Path]:
        """The files of a new certificate and its key, in place of those of the last one."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
        certificate = self._sign(name, key.public_key(), serial, is_authority=False)
        certfile, keyfile = folder / "cert.pem", folder / "key.pem"
        certfile.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        keyfile.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certfile, keyfile

    def _sign(
        self, name: x509.Name, key: ec.EllipticCurvePublicKey, serial: int, *, is_authority: bool
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        address = x509.SubjectAlternativeName([x509.DNSName("localhost")])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(serial)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(address, critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One of our own."""
    return Authority(tmp_path)


@pytest.fixture
def secure_server(text_model: Path, tmp_path: Path, authority: Authority) -> Iterator[RunningServer]:
    """A server whose certificate the test may change."""
    certfile, keyfile = authority.write(tmp_path, 100)
    flags = [f"--ssl-certfile={certfile}", f"--ssl-keyfile={keyfile}", "--enable-ssl-refresh"]
    with running_server(str(text_model), *flags, command=COMMAND) as server:
        yield server


def shown_serial(server: RunningServer, authority: Authority) -> int:
    """The number of the certificate that a new connection is shown."""
    port = int(server.url.rpartition(":")[2])
    context = ssl.create_default_context(cafile=str(authority.certfile))
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        data = connection.getpeercert(binary_form=True)
    assert data is not None
    return x509.load_der_x509_certificate(data).serial_number


def test_a_certificate_that_changes_is_shown_to_new_connections(
    secure_server: RunningServer, authority: Authority, tmp_path: Path
) -> None:
    assert shown_serial(secure_server, authority) == 100

    authority.write(tmp_path, 101)

    until(lambda: shown_serial(secure_server, authority) == 101)


def test_a_certificate_that_cannot_be_used_changes_nothing_and_is_told(
    secure_server: RunningServer, authority: Authority, tmp_path: Path
) -> None:
    (tmp_path / "cert.pem").write_text("broken")
    until(lambda: "the new TLS files cannot be used" in secure_server.stderr)

    assert shown_serial(secure_server, authority) == 100

    authority.write(tmp_path, 102)
    until(lambda: shown_serial(secure_server, authority) == 102)


def test_a_stream_goes_on_while_its_certificate_is_replaced(
    secure_server: RunningServer, authority: Authority, tmp_path: Path
) -> None:
    context = ssl.create_default_context(cafile=str(authority.certfile))
    url = secure_server.url.replace("127.0.0.1", "localhost")
    body = {"prompt": "!slow", "max_tokens": 300, "stream": True}
    with (
        httpx.Client(base_url=url, verify=context, timeout=60) as http,
        http.stream("POST", "/v1/completions", json=body) as response,
    ):
        lines = response.iter_lines()
        next(lines)
        authority.write(tmp_path, 103)
        until(lambda: shown_serial(secure_server, authority) == 103)

        assert [line for line in lines if line][-1] == "data: [DONE]"


def test_old_versions_of_tls_are_refused(secure_server: RunningServer) -> None:
    port = int(secure_server.url.rpartition(":")[2])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        context.maximum_version = ssl.TLSVersion.TLSv1_1

    with socket.create_connection(("127.0.0.1", port)) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain)


def test_clients_without_a_certificate_are_refused_where_one_is_required(
    text_model: Path, tmp_path: Path, authority: Authority
) -> None:
    certfile, keyfile = authority.write(tmp_path, 100)
    flags = [f"--ssl-certfile={certfile}", f"--ssl-keyfile={keyfile}"]
    flags += [f"--ssl-ca-certs={authority.certfile}", "--ssl-cert-reqs=2"]
    with running_server(str(text_model), *flags, command=COMMAND) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        context = ssl.create_default_context(cafile=str(authority.certfile))
        with httpx.Client(base_url=url, verify=context) as http, pytest.raises(httpx.TransportError):
            http.get("/live")

        context.load_cert_chain(certfile, keyfile)
        with httpx.Client(base_url=url, verify=context) as http:
            assert http.get("/live").status_code == 200


def test_tls_files_that_cannot_be_used_stop_the_start(text_model: Path, tmp_path: Path) -> None:
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("broken")
    flags = [f"--ssl-certfile={tmp_path / 'cert.pem'}", f"--ssl-keyfile={tmp_path / 'key.pem'}"]

    line = start_fails(str(text_model), *flags)

    assert "the TLS files cannot be used" in line


def test_a_unix_socket_serves_and_is_removed_at_the_end(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with running_server(str(text_model), f"--uds={path}", command=COMMAND) as server:
        assert server.url == f"unix:{path}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as http:
            assert http.get("/health").status_code == 200
            answer = http.post("/v1/completions", json={"prompt": "abc"}).json()
            assert answer["choices"][0]["text"] == "abc"
            body = {"prompt": "abc", "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as response:
                assert [line for line in response.iter_lines() if line][-1] == "data: [DONE]"

        assert server.stop() == 0
    assert not path.exists()


def test_the_socket_of_a_server_that_was_killed_is_taken_over(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))

    flags = (f"--uds={path}", "--uds-permissions=600")
    with running_server(str(text_model), *flags, command=COMMAND):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://x") as http:
            assert http.get("/live").status_code == 200


def test_the_socket_of_a_server_that_runs_is_left_alone(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "server.sock"
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(path))
        alive.listen()

        line = start_fails(str(text_model), f"--uds={path}")

        assert line == f"loramux: error: another server listens on {path} (--uds)\n"
        assert path.exists()


def test_a_file_that_is_no_socket_is_left_alone(text_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")

    line = start_fails(str(text_model), f"--uds={path}")

    assert "is no socket" in line
    assert path.read_text() == "data"


@pytest.mark.skipif(not Path("/proc/net/if_inet6").exists(), reason="no IPv6 here")
def test_ipv6_addresses_work(text_model: Path) -> None:
    if not os.path.getsize("/proc/net/if_inet6") and not Path("/proc/net/if_inet6").read_text():
        pytest.skip("no IPv6 address here")
    with running_server(str(text_model), "--host=::1", command=COMMAND) as server:
        assert server.url.startswith("http://[::1]:")
        with server.client() as http:
            assert http.get("/live").status_code == 200
