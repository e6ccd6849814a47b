# Samples (`VMM MEASURE VALUE`) to rows: ours, the best peer's, their ratio, the
# target and whether it is met. Medians throughout. What rows there are, and
# their targets, each benchmark says in a file of its own:
#
#   awk -v json=0|1 -f report.awk -f boot.awk samples    status 1 when a target is missed

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

# row(MEASURE, TEXT, UNIT, SCALE, KIND, LIMIT, OTHERWISE): KIND is `ratio` (ours to
# the best peer's), `value` (ours) or empty (no target). SCALE divides the sample.
# OTHERWISE says what else meets the target, and is empty unless that holds. With `-v alone=1` there
# may be no peer, and then a ratio has no target.
function row(measure, text, unit, scale, kind, limit, otherwise,    ours, peer, name, vmm, m, ratio, met, target) {
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
    if (kind == "ratio" && name == "" && alone) kind = ""
    ratio = name == "" ? "null" : sprintf("%.3f", ours / peer)
    if (kind == "ratio" && name == "") {
        printf "bench: no peer has samples of %s\n", measure > "/dev/stderr"
        failed = 1
        return
    }
    met = kind == "ratio" ? ours <= limit * peer : kind == "value" ? ours <= limit : 1
    if (otherwise != "") met = 1
    if (!met) failed = 1
    target = kind == "ratio" ? sprintf("ratio <= %g", limit) : kind == "value" ? sprintf("<= %g %s", limit, unit) : ""
    if (otherwise != "") target = target ", or " otherwise
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

function begin_report() {
    if (json) print "["
    else printf "%-34s %12s %12s %-14s %7s  %-16s\n", "measure", "ours", "best peer", "", "ratio", "target"
}

function end_report() {
    if (json) print "\n]"
    exit failed
}
