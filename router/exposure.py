"""Who could reach the public ports, and what must then be asked of callers.

Pure; asked by `kvrelay serve` before anything starts, and again by every router.
"""

from ipaddress import IPv6Address, ip_address


class ExposureError(ValueError):
    """The router would be open to strangers; one line that says what to do."""


def check_exposure(host: str, *, api_keys: bool, certificates: bool, insecure: bool) -> None:
    """Only loopback is open to anybody. Elsewhere callers show an API key or, where there are no
    keys, a certificate; keys do not travel in clear text.

    Raises:
        ExposureError: `host` needs more than there is.
    """
    if certificates or insecure or is_loopback(host):
        return
    if api_keys:
        raise ExposureError(
            f"on {host} API keys would travel in clear text: "
            "add --certificates DIR, or say --insecure"
        )
    raise ExposureError(
        f"{host} can be reached by strangers: "
        "add --certificates DIR, with --api-keys FILE or certificates for clients, "
        "or say --insecure"
    )


def client_certificates_needed(*, api_keys: bool) -> bool:
    """Whether TLS clients have to show a certificate: an API key says who they are as well."""
    return not api_keys


def bind_host(host: str) -> str:
    """`host` as both public servers understand it alike: an address without brackets, or a name.

    Raises:
        ExposureError: it is empty.
    """
    host = host.strip().removeprefix("[").removesuffix("]")
    if not host:
        raise ExposureError("empty: say 127.0.0.1 for this machine alone, :: for all addresses")
    if host == "localhost":
        return "127.0.0.1"  # one of the several that it may stand for
    try:
        address = ip_address(host)
    except ValueError:
        return host
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address)


def is_loopback(host: str) -> bool:
    """False for names, whatever they may resolve to one day; localhost is the one exception."""
    if host == "localhost":
        return True
    try:
        address = ip_address(host.strip("[]"))
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def listen_address(host: str, port: int) -> str:
    """HOST:PORT as gRPC takes it."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
