# The rows of `scripts/bench boot`.

END {
    begin_report()
    row("init-us", "time to guest init", "s", 1000000, "ratio", 0.9)
    row("exits", "exits to user space", "exits", 1, "value", 5000)
    row("resident-bytes", "memory beyond guest RAM", "MiB", 1048576, "value", 5)
    row("binary-bytes", "binary", "MiB", 1048576, "value", 4)
    row("startup-16-us", "start-up with 16 functions", "ms", 1000, "", 0)
    row("startup-64-us", "start-up with 64 functions", "ms", 1000, "", 0)
    # Linear growth: four times the functions take at most four times as long.
    row("startup-256-us", "start-up with 256 functions", "ms", 1000, "value", 4 * median("ravelin", "startup-64-us") / 1000)
    end_report()
}
