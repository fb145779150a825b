"""Signatures of small files by ssh-keygen, with the keys that people have already."""

import re
import subprocess
import tempfile
from pathlib import Path

KEY = re.compile(r"[a-z0-9@.-]+ [A-Za-z0-9+/]+=*")  # TYPE BASE64
BEGIN = "-----BEGIN SSH SIGNATURE-----"


def ssh_keygen(words, data=b""):
    """What `ssh-keygen WORDS` says to these bytes on stdin. ValueError: its last line, or that there is none."""
    try:
        done = subprocess.run(["ssh-keygen", *words], input=data, capture_output=True, check=False)
    except FileNotFoundError:
        raise ValueError(
            "no ssh-keygen on this machine, which signs and checks: install OpenSSH's client"
        ) from None
    if done.returncode:
        said = (done.stderr + done.stdout).decode("utf-8", "replace").split("\n")
        raise ValueError(
            next((line.strip() for line in reversed(said) if line.strip()), "ssh-keygen fails")
        )
    return done.stdout.decode("utf-8", "replace")


def public_key(path):
    """`TYPE BASE64` of a public key file, or of a private key; without the comment, often a name. ValueError."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such key; ssh-keygen -t ed25519 -f {path} makes one")
    said = path.read_bytes()[:20_000].decode("utf-8", "replace")
    if "PRIVATE KEY" in said:
        try:
            said = ssh_keygen(["-y", "-f", str(path)])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    found = " ".join(said.split()[:2])
    if not KEY.fullmatch(found):
        raise ValueError(f"{path}: is no key of OpenSSH")
    return found


def sign(data, key, namespace):
    """The signature of these bytes, as text, by the private key in the file `key`. ValueError."""
    try:
        return ssh_keygen(["-Y", "sign", "-q", "-f", str(key), "-n", namespace], data)
    except ValueError as error:
        raise ValueError(f"--sign {key}: {error}") from None


def trouble(data, signature, public, namespace):
    """Why the file `signature` is not one of these bytes by the public key, or None: it is."""
    with tempfile.TemporaryDirectory() as folder:
        signers = Path(folder, "signers")
        signers.write_text(f'signer namespaces="{namespace}" {public}\n')
        try:
            words = [
                "-Y",
                "verify",
                "-f",
                str(signers),
                "-I",
                "signer",
                "-n",
                namespace,
                "-s",
                str(signature),
            ]
            ssh_keygen(words, data)
        except ValueError as error:
            if "no ssh-keygen" in str(error):
                raise
            return str(error)
    return None
