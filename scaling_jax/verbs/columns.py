"""--columns, which says what our columns are called in somebody else's table."""

from scaling_jax.errors import UserError

EXAMPLE = "--columns='params=Model Size,flops=Training FLOP,loss=loss'"


def parse_columns(text: str) -> dict[str, str]:
    """The mapping of --columns, ours to theirs: 'params=N,batch_tokens=bs*2048'. UserError where a part is none."""
    columns: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        ours, equals, theirs = part.partition("=")
        if not equals or not ours.strip() or not theirs.strip():
            raise UserError(f"--columns={text}: {part!r} must be OURS=THEIRS, as in {EXAMPLE}")
        if ours.strip() in columns:
            raise UserError(f"--columns={text}: {ours.strip()} is given twice")
        columns[ours.strip()] = theirs.strip()
    return columns
