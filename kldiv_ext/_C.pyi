# What the extension module holds besides the operators it registers.
cpu_isa: str
divergences: dict[str, str]
