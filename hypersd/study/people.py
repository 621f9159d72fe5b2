"""Who votes: a secret token in the browser, from it a receipt to keep, from that a pseudonym in the database.

Each is a hash of the one before, so the receipt withdraws but cannot vote, and the database knows neither.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

from hypersd.records import InputError

RECEIPT_CHARACTERS = 20  # of 5 bits each
TOKEN = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    """128 random bits in hex: a token for an annotator, or the id of a ballot."""
    return secrets.token_hex(16)


def receipt_of(token: str) -> str:
    """The code with which the owner of a token can withdraw, such as "K7QM-2XVD-R3AB-76TC-LWPF"."""
    if not isinstance(token, str) or not TOKEN.fullmatch(token):
        raise InputError("this browser's study token cannot be read; clear the page's data to begin anew")
    code = base64.b32encode(_hash("receipt", token)).decode()[:RECEIPT_CHARACTERS]
    return "-".join(code[at : at + 4] for at in range(0, RECEIPT_CHARACTERS, 4))


def annotator_of(receipt: str) -> str:
    """The pseudonym, 32 hex digits, of whoever holds a receipt. Spaces, dashes and small letters do not matter."""
    code = "".join(receipt.upper().replace("-", " ").split())
    if not re.fullmatch(rf"[A-Z2-7]{{{RECEIPT_CHARACTERS}}}", code):
        raise InputError(f"a receipt has {RECEIPT_CHARACTERS} letters and digits such as K7QM-2XVD-R3AB-76TC-LWPF")
    return _hash("annotator", code).hex()[:32]


def _hash(purpose: str, text: str) -> bytes:
    return hmac.digest(b"hypersd " + purpose.encode(), text.encode(), hashlib.sha256)
