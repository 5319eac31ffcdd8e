"""Bootstrap of the tangle; appendix A replaces this file by its own."""
import ast, pathlib, re, sys
import jupytext

def tangle(path):
    nb = jupytext.read(path)
    meta = nb.metadata.get("gptoss", {})
    default = meta.get("module")
    out, heading = {}, None
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            for line in cell.source.splitlines():
                m = re.match(r"#+ (.*)", line)
                if m: heading = m.group(1)
            continue
        for tag in cell.metadata.get("tags", []):
            if tag == "export" or tag.startswith("export:"):
                name = tag.partition(":")[2] or default
                part = out.setdefault(name, [])
                part.append((heading, cell.source))
    for name, cells in out.items():
        text, last = [f'"""Generated from book/{pathlib.Path(path).name}; edit that, not this."""\n'], None
        for h, src in cells:
            if h != last: text.append(f"# ---- {h}\n"); last = h
            text.append(src + "\n")
        target = pathlib.Path("gptoss") / f"{name}.py"
        target.write_text("\n".join(text)); print("wrote", target)

if __name__ == "__main__":
    for p in sys.argv[1:]: tangle(p)
