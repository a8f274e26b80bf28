"""The cluster's certificates and kubeconfigs, made with the openssl program. They last a month."""

import base64
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

from tests.cluster import commands

DAYS = "30"
CURVE = ("ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")


@dataclass(frozen=True)
class Authority:
    """A certificate authority in a directory, and what it has signed. Files that exist are kept."""

    directory: Path

    @property
    def certificate(self) -> Path:
        """The authority's own certificate."""
        return self.directory / "ca.crt"

    @property
    def account_key(self) -> Path:
        """The key that signs service account tokens."""
        return self.directory / "service-account.key"

    @property
    def account_public_key(self) -> Path:
        """What checks service account tokens."""
        return self.directory / "service-account.pub"

    def create(self) -> None:
        """Make the authority and the service account keys."""
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not self.certificate.exists():
            commands.run(
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    *CURVE,
                    "-nodes",
                    "-days",
                    DAYS,
                    "-subj",
                    "/CN=test-bed",
                    # Python 3.13 and later refuse an authority without it.
                    "-addext",
                    "keyUsage=critical,keyCertSign,cRLSign",
                ),
                *("-keyout", self.directory / "ca.key", "-out", self.certificate),
            )
        if not self.account_public_key.exists():
            commands.run("openssl", "genpkey", "-algorithm", *CURVE, "-out", self.account_key)
            commands.run("openssl", "pkey", "-in", self.account_key, "-pubout", "-out", self.account_public_key)

    def sign(self, name: str, user: str, group: str = "", addresses: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """Return certificate and key for a user of a group, valid for ``DNS:x`` and ``IP:y`` addresses."""
        certificate, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        if certificate.exists():
            return certificate, key
        request, extensions = self.directory / f"{name}.csr", self.directory / f"{name}.ext"
        subject = (f"/O={group}" if group else "") + f"/CN={user}"
        commands.run(
            *("openssl", "req", "-new", "-newkey", *CURVE, "-nodes", "-subj", subject),
            *("-keyout", key, "-out", request),
        )
        names = f"subjectAltName={','.join(addresses)}\n" if addresses else ""
        identifiers = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        extensions.write_text(f"extendedKeyUsage=clientAuth,serverAuth\n{identifiers}{names}")
        partial = certificate.with_suffix(".partial")
        commands.run(
            *("openssl", "x509", "-req", "-in", request, "-days", DAYS, "-extfile", extensions),
            *(
                "-CA",
                self.certificate,
                "-CAkey",
                self.directory / "ca.key",
                *("-set_serial", f"0x{secrets.token_hex(8)}"),
                "-out",
                partial,
            ),
        )
        partial.rename(certificate)
        return certificate, key

    def kubeconfig(self, target: Path, server: str, user: str, group: str = "") -> Path:
        """Write a kubeconfig with which a user of a group speaks to ``server``, and return its path."""
        certificate, key = self.sign(f"client-{user.replace(':', '-')}", user, group)

        def data(file: Path) -> str:
            return base64.b64encode(file.read_bytes()).decode()

        name = "test-bed"
        cluster = {"server": server, "certificate-authority-data": data(self.certificate)}
        credentials = {"client-certificate-data": data(certificate), "client-key-data": data(key)}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": name,
            "clusters": [{"name": name, "cluster": cluster}],
            "users": [{"name": name, "user": credentials}],
            "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        }
        partial = target.with_suffix(".partial")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(config, indent=1))
        partial.rename(target)
        return target
