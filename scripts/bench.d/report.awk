# Samples (`VMM MEASURE VALUE`) to rows: ours, the best peer's, their ratio, the
# target and whether it is met. Medians throughout.
#
#   awk -v json=0|1 -f report.awk samples        status 1 when a target is missed

{ values[$1, $2, ++count[$1, $2]] = $3 + 0; vmms[$1] }

function median(vmm, measure,    n, i, j, t, sorted) {
    n = count[vmm, measure]
    for (i = 1; i <= n; i++) {
        t = values[vmm, measure, i]
        for (j = i - 1; j > 0 && sorted[j] > t; j--) sorted[j + 1] = sorted[j]
        sorted[j + 1] = t
    }
    return n % 2 ? sorted[(n + 1) / 2] : (sorted[n / 2] + sorted[n / 2 + 1]) / 2
}

# row(MEASURE, TEXT, UNIT, SCALE, KIND, LIMIT): KIND is `ratio` (ours to the best
# peer's), `value` (ours) or empty (no target). SCALE divides the sample.
function row(measure, text, unit, scale, kind, limit,    ours, peer, name, vmm, m, ratio, met, target) {
    if (!count["ravelin", measure]) {
        printf "bench: no samples of %s\n", measure > "/dev/stderr"
        failed = 1
        return
    }
    ours = median("ravelin", measure) / scale
    name = ""
    for (vmm in vmms)
        if (vmm != "ravelin" && count[vmm, measure]) {
            m = median(vmm, measure) / scale
            if (name == "" || m < peer) { peer = m; name = vmm }
        }
    ratio = name == "" ? "null" : sprintf("%.3f", ours / peer)
    met = kind == "ratio" ? ours <= limit * peer : kind == "value" ? ours <= limit : 1
    if (!met) failed = 1
    target = kind == "ratio" ? sprintf("ratio <= %g", limit) : kind == "value" ? sprintf("<= %g %s", limit, unit) : ""
    if (json) {
        printf "%s  {\"measure\": \"%s\", \"unit\": \"%s\", \"ours\": %.3f, \"peer\": %s, \"peer_name\": %s, \"ratio\": %s, \"target\": %s, \"met\": %s, \"runs\": %d}", \
            (rows++ ? ",\n" : ""), text, unit, ours, (name == "" ? "null" : sprintf("%.3f", peer)), \
            (name == "" ? "null" : "\"" name "\""), ratio, (target == "" ? "null" : "\"" target "\""), \
            (kind == "" ? "null" : met ? "true" : "false"), count["ravelin", measure]
    } else {
        printf "%-34s %12.2f %12s %-14s %7s  %-16s %s\n", text " (" unit ")", ours, \
            (name == "" ? "-" : sprintf("%.2f", peer)), name, (ratio == "null" ? "-" : ratio), target, \
            (kind == "" ? "" : met ? "met" : "MISSED")
    }
}

END {
    if (json) print "["
    else printf "%-34s %12s %12s %-14s %7s  %-16s\n", "measure", "ours", "best peer", "", "ratio", "target"
    row("init-us", "time to guest init", "s", 1000000, "ratio", 0.9)
    row("exits", "exits to user space", "exits", 1, "value", 5000)
    row("resident-bytes", "memory beyond guest RAM", "MiB", 1048576, "value", 5)
    row("binary-bytes", "binary", "MiB", 1048576, "value", 4)
    row("startup-16-us", "start-up with 16 functions", "ms", 1000, "", 0)
    row("startup-64-us", "start-up with 64 functions", "ms", 1000, "", 0)
    # Linear growth: four times the functions take at most four times as long.
    row("startup-256-us", "start-up with 256 functions", "ms", 1000, "value", 4 * median("ravelin", "startup-64-us") / 1000)
    if (json) print "\n]"
    exit failed
}
