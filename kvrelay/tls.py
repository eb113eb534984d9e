"""TLS with the certificates of the cluster: both ends show one, signed by the folder's CA.

Used by the KV links (transport/). The folder holds ca.pem, cert.pem and key.pem.
"""

import ssl
from pathlib import Path

_FILES = ("ca.pem", "cert.pem", "key.pem")


class CertificatesError(Exception):
    """The folder cannot be used; one line that says why."""


def server_context(folder: Path) -> ssl.SSLContext:
    """Of the end that is connected to; refuses who shows no certificate of our CA."""
    return _context(folder, ssl.PROTOCOL_TLS_SERVER)


def client_context(folder: Path) -> ssl.SSLContext:
    """Of the end that connects. Names are not compared: hosts come and go, and any certificate
    of the cluster's own CA is a worker's."""
    return _context(folder, ssl.PROTOCOL_TLS_CLIENT)


def _context(folder: Path, protocol: int) -> ssl.SSLContext:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise CertificatesError(f"{folder} has no {' and no '.join(missing)}")
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    ca, certificate, key = (folder / name for name in _FILES)
    try:
        context.load_verify_locations(ca)
        context.load_cert_chain(certificate, key, password="")  # else OpenSSL asks the terminal
    except (ssl.SSLError, OSError) as error:
        raise CertificatesError(f"the certificates in {folder} are not usable: {error}") from error
    return context
