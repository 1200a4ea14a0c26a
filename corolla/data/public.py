"""Public rows: those that belong to no client, from which the server may choose for everybody."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from corolla.config.run import RunConfig
from corolla.data import federated
from corolla.data.encoding import Encoded, Encoder
from corolla.data.rows import read_rows
from corolla.errors import DataError


def sequences(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    wanted_by: str,
) -> list[Encoded]:
    """The sequences of up to `public_examples` public rows, evenly spread over them.

    `wanted_by` is the setting that reads them, for what is said of a mistake. Raises DataError for
    rows that belong to a client, or have no target left.
    """
    try:
        rows, _ = read_rows(str(config.public))
    except DataError as error:
        raise DataError(f"public rows for {wanted_by}: {error}") from error
    owned = next((row.client for row in rows if row.client is not None), None)
    if owned is not None:
        raise DataError(
            f"{config.public}: rows for {wanted_by} belong to no client, found client_id "
            f"{owned!r}: what is made from them is sent to everybody"
        )
    encoder = Encoder.of(config, tokenizer, labels)
    encoded = [s for row in federated.spread(rows, config.public_examples) for s in encoder(row)]
    if not encoded:
        raise DataError(
            f"{config.public}: no row has a target left within max_length={config.max_length}"
        )
    return encoded
