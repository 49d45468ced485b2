# What CI does, by hand. Needs uv; `just` is optional, the lines are plain commands.

# lint, format and types
check:
    uv run ruff check .
    uv run ruff format --check .
    uv run pyright

# the whole test suite
test:
    uv run pytest

# each package alone, with nothing of the others installed
test-alone:
    for p in ops data backbones methods tasks; do uv run --isolated --no-default-groups --package lungssl-$p --with pytest --with jaxtyping --with beartype --with hypothesis pytest packages/lungssl-$p -q || exit 1; done

# micro-benchmarks; the last line printed is JSON
bench:
    uv run python benchmarks/bench_ops.py

# pins for pip users
constraints:
    uv export --no-hashes --no-header --no-annotate --no-emit-workspace --all-groups -o constraints.txt

docs:
    uv run --group docs mkdocs build --strict
