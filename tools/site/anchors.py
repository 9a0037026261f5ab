import re


def slug(heading):
    "Anchor of a heading: as GitHub spells it, but with the dot of `Class.method` kept."
    return re.sub(r"[^\w\s.-]", "", heading.strip().lower()).replace(" ", "-").rstrip(".")
