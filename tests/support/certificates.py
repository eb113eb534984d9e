"""Certificates of a cluster, made by the openssl command for one run of the tests."""

import subprocess
from pathlib import Path

_NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


def make_certificates(
    folder: Path, names: str = "DNS:kvrelay.test,DNS:localhost,IP:127.0.0.1", days: int = 2
) -> Path:
    """A new CA with one certificate: ca.pem, cert.pem and key.pem as kvrelay/tls.py wants them.

    names: whom the certificate is for; the first DNS name is that of all members. days: how long.
    """
    folder.mkdir()
    authority, request = folder / "ca.key", folder / "request.pem"
    _openssl(
        *("req", "-x509", *_NEW_KEY, "-days", "2", "-subj", f"/CN={folder.name} CA"),
        *("-keyout", authority, "-out", folder / "ca.pem"),
    )
    (folder / "names").write_text(f"subjectAltName={names}")
    _openssl(
        *("req", *_NEW_KEY, "-subj", f"/CN={folder.name} worker"),
        *("-keyout", folder / "key.pem", "-out", request),
    )
    _openssl(
        *("x509", "-req", "-days", str(days), "-in", request, "-set_serial", "1"),
        *("-extfile", folder / "names"),
        *("-CA", folder / "ca.pem", "-CAkey", authority, "-out", folder / "cert.pem"),
    )
    return folder


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
