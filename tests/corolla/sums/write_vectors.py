"""Writes vectors.json: published vectors of the primitives, and sessions of the reference.

    python tests/corolla/sums/write_vectors.py

Bytes are hexadecimal; of what is longer than 65536 bytes there is the SHA-256, after "sha256:".
`draws` are all random bytes of a member, in the order in which it takes them.
"""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.corolla.sums import reference

PATH = Path(__file__).with_name("vectors.json")
_LONGEST = 1 << 16

CASES = (
    reference.Case("five", 5, 1, 8, no_reply=[2], whole=range(5)),
    reference.Case("ten", 10, 3, 1, no_deposit=[1], no_reply=[4, 7], whole=range(10)),
    reference.Case("long", 5, 1, (1 << 18) + 1, whole=range(5)),
    reference.Case("many", 250, 83, 1, no_deposit=[249], whole=[7]),
)

_ALICE = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
_BOB = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
_SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
    b"future, sunscreen would be it."
)

PUBLISHED = {
    "RFC 7748, 6.1": {
        "secret": _ALICE,
        "public": _BOB,
        "agreed": "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
    },
    "RFC 5869, A.1": {
        "secret": "0b" * 22,
        "salt": "000102030405060708090a0b0c",
        "info": "f0f1f2f3f4f5f6f7f8f9",
        "key": "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
        "34007208d5b887185865",
    },
    "RFC 8439, 2.8.2": {
        "key": "808182838485868788898a8b8c8d8e8f909192939495969798999a9b9c9d9e9f",
        "nonce": "070000004041424344454647",
        "text": "50515253c0c1c2c3c4c5c6c7",
        "plain": _SUNSCREEN.hex(),
        "box": "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6"
        "3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36"
        "92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b61161ae10b594f09e26a7e902ecbd0600691",
    },
    "RFC 8032, 7.1": {
        "secret": "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60",
        "public": "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        "text": "",
        "signature": "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e06522490155"
        "5fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
    },
    "SP 800-38A, F.5.5": {
        "key": "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4",
        "counter": "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
        "plain": "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710",
        "stream": "601ec313775789a5b7a7f504bbf3d228f443e3ca4d62b59aca84e990cacaf5c5"
        "2b0930daa23de94ce87017ba2d84988ddfc9c58db67aada613c2dd08457941a6",
    },
}


def shown(value: Any) -> Any:
    """A value for JSON: bytes as text, long ones as their hash."""
    if isinstance(value, bytes):
        long = len(value) > _LONGEST
        return f"sha256:{hashlib.sha256(value).hexdigest()}" if long else value.hex()
    if isinstance(value, Mapping):
        return {str(key): shown(own) for key, own in value.items()}
    return value


def vectors() -> dict[str, Any]:
    """All vectors, as they are in the file."""
    secret, random = bytes(range(32)), bytes(range(32, 96))
    shares = [share.hex() for share in reference.split(secret, 3, 5, random)]
    shamir = {"secret": secret.hex(), "threshold": 3, "coefficients": random.hex()}
    masks = {str(n): reference.stream(bytes(range(32)), n).tobytes().hex() for n in (1, 8)}
    return {
        "published": PUBLISHED,
        "shamir": {**shamir, "shares": shares},
        "stream": {"key": bytes(range(32)).hex(), "of_values": masks},
        "sessions": [
            {
                "name": case.name,
                "members": case.members,
                "missing": case.missing,
                "values": case.values,
                "no_deposit": list(case.no_deposit),
                "no_reply": list(case.no_reply),
                "settings": {
                    "run": case.RUN.hex(),
                    "round": case.ROUND,
                    "attempt": case.ATTEMPT,
                    "task": [part.hex() for part in case.TASK],
                    "bound": case.BOUND,
                    "weight": case.WEIGHT,
                    "input": "x[k] = (k + 1) (member + 1) 1000003 mod 2^32",
                },
                **shown(reference.session(case)),
            }
            for case in CASES
        ],
    }


if __name__ == "__main__":
    PATH.write_text(json.dumps(vectors(), indent=1) + "\n")
