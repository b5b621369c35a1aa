# What the extension module holds besides the operators that it registers.
cpu_isa: str
divergences: dict[str, str]
row_constants: int
row_stats: int
