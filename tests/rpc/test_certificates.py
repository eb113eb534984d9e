"""What the certificate folder gives to gRPC and HTTP servers, and what is said of a bad one."""

import shutil
import ssl
from pathlib import Path

import pytest
from certificates import make_certificates

from kvrelay.rpc import listen, make_server
from kvrelay.tls import CertificatesError, grpc_channel, member_name, server_context


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls") / "good")


def test_members_go_by_the_first_dns_name(good, tmp_path):
    assert member_name(good) == "kvrelay.test"
    stars = make_certificates(tmp_path / "stars", "IP:10.0.0.1,DNS:*.example.com,DNS:b")
    assert member_name(stars) == "kvrelay.example.com"


def test_a_certificate_without_a_name(tmp_path):
    folder = make_certificates(tmp_path / "nameless", "IP:127.0.0.1")
    with pytest.raises(CertificatesError, match="needs a subjectAltName such as DNS:localhost"):
        member_name(folder)


def test_a_certificate_of_another_ca(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "mixed"))
    other = make_certificates(tmp_path / "other")
    shutil.copy(other / "ca.pem", folder)
    with pytest.raises(CertificatesError, match=r"cert\.pem in .* is not good: ") as caught:
        member_name(folder)
    assert "\n" not in str(caught.value)


async def test_a_server_says_what_is_wrong_with_its_certificates(tmp_path):
    server = make_server()
    with pytest.raises(CertificatesError, match=r"has no ca\.pem"):
        listen(server, "127.0.0.1:0", tmp_path)
    folder = make_certificates(tmp_path / "over", days=-1)
    with pytest.raises(CertificatesError, match="expired"):
        listen(server, "127.0.0.1:0", folder)
    await server.stop(None)


def test_a_channel_needs_the_ca_and_may_have_a_certificate(good, tmp_path):
    assert grpc_channel(good)
    with pytest.raises(CertificatesError, match=r"has no ca\.pem"):
        grpc_channel(tmp_path)
    shutil.copy(good / "ca.pem", tmp_path)
    assert grpc_channel(tmp_path)
    shutil.copy(good / "cert.pem", tmp_path)
    with pytest.raises(CertificatesError, match=r"has no key\.pem"):
        grpc_channel(tmp_path)


@pytest.mark.parametrize("needed", [True, False])
def test_http_asks_for_the_same(good, needed):
    context = server_context(good, client_certificates=needed)
    assert context.verify_mode is (ssl.CERT_REQUIRED if needed else ssl.CERT_NONE)
