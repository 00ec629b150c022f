"""Draw the documents' pictures from the adapters in examples/: ``python docs/images/draw.py``."""

from pathlib import Path

from pcb_peft import compare_adapters, merge_adapters

HERE = Path(__file__).parent
ADAPTERS = sorted((HERE.parents[1] / "examples" / "minilm" / "lora").iterdir())

figures = {
    "shares": merge_adapters(ADAPTERS, progress=False).report.plot_shares(),
    "cosines": compare_adapters(ADAPTERS, progress=False).plot_cosines(),
}
for name, figure in figures.items():
    figure.savefig(HERE / f"{name}.png", dpi=110)
