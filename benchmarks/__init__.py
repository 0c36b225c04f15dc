"""
What the plugin server costs, measured.

    python -m benchmarks.bench        the table of docs/performance.md
    python -m benchmarks.soak         nothing grows over 200,000 events

The load generator and the floor server are C, compiled into a temporary folder by the run itself.
"""
