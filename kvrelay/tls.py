"""TLS with the certificates of the cluster: all ends show one, signed by the folder's CA.

The folder holds ca.pem, cert.pem and key.pem. Used by the KV links (transport/), by sessions of
routers with workers, by the public servers and by clients. A client's folder may hold ca.pem alone
where the server asks for no certificate of the client's.
"""

import ssl
from pathlib import Path
from typing import Any

import grpc

_FILES = ("ca.pem", "cert.pem", "key.pem")


class CertificatesError(ValueError):
    """The folder cannot be used; one line that says why."""


def server_context(folder: Path, *, client_certificates: bool = True) -> ssl.SSLContext:
    """Of the end that is connected to.

    client_certificates: whether it refuses who shows no certificate of our CA.
    """
    context = _context(folder, ssl.PROTOCOL_TLS_SERVER)
    if not client_certificates:
        context.verify_mode = ssl.CERT_NONE
    return context


def client_context(folder: Path) -> ssl.SSLContext:
    """Of the end that connects. Names are not compared: hosts come and go, and any certificate
    of the cluster's own CA is a worker's."""
    return _context(folder, ssl.PROTOCOL_TLS_CLIENT)


def member_name(folder: Path) -> str:
    """The first DNS name of the folder's certificate. gRPC always compares names, so all members of
    a cluster show certificates that begin with the same one.

    Raises:
        CertificatesError: there is none, or the certificate is not good: not of this CA, expired,
            not for this key.
    """
    certificate = _shown_to_itself(folder)
    for kind, name in certificate.get("subjectAltName", ()):
        if kind == "DNS":
            return name.replace("*", "kvrelay")
    raise CertificatesError(
        f"cert.pem in {folder} names no host: it needs a subjectAltName such as DNS:localhost"
    )


def grpc_server(folder: Path, *, client_certificates: bool) -> grpc.ServerCredentials:
    """client_certificates: whether a client has to show one of the folder's CA.

    Raises:
        CertificatesError: as in `member_name`; gRPC would not say what is wrong.
    """
    member_name(folder)
    ca, certificate, key = _read(folder, _FILES)
    return grpc.ssl_server_credentials(
        [(key, certificate)],
        root_certificates=ca if client_certificates else None,
        require_client_auth=client_certificates,
    )


def grpc_channel(folder: Path) -> grpc.ChannelCredentials:
    """Shows the folder's certificate, if it has one; raises CertificatesError."""
    own = any((folder / name).exists() for name in _FILES[1:])
    names = _FILES if own else _FILES[:1]
    _load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), folder, names)  # says what is wrong
    ca, *pair = _read(folder, names)
    certificate, key = pair or (None, None)
    return grpc.ssl_channel_credentials(ca, private_key=key, certificate_chain=certificate)


def _context(folder: Path, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, folder, _FILES)
    return context


def _load(context: ssl.SSLContext, folder: Path, names: tuple[str, ...]) -> None:
    _require(folder, names)
    ca, certificate, key = (folder / name for name in _FILES)
    try:
        context.load_verify_locations(ca)
        if names == _FILES:  # without a password OpenSSL would ask the terminal
            context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise CertificatesError(f"the certificates in {folder} are not usable: {error}") from error


def _shown_to_itself(folder: Path) -> dict[str, Any]:
    """The folder's certificate as a peer with the same folder sees it, after a handshake of both
    ends in memory: so all is checked that a peer would check."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(folder).wrap_bio(back, there)
    server = server_context(folder).wrap_bio(there, back, server_side=True)
    waiting = [client, server]
    try:
        while waiting:
            end = waiting.pop(0)
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                waiting.append(end)
    except ssl.SSLCertVerificationError as error:
        reason = error.verify_message
        raise CertificatesError(f"cert.pem in {folder} is not good: {reason}") from error
    except ssl.SSLError as error:
        raise CertificatesError(f"the certificates in {folder} are not usable: {error}") from error
    return client.getpeercert() or {}


def _require(folder: Path, names: tuple[str, ...]) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CertificatesError(f"{folder} has no {' and no '.join(missing)}")


def _read(folder: Path, names: tuple[str, ...]) -> list[bytes]:
    _require(folder, names)
    try:
        return [(folder / name).read_bytes() for name in names]
    except OSError as error:
        text = f"the certificates in {folder} are not usable: {error.strerror}"
        raise CertificatesError(text) from error
