# The rows of `scripts/bench iommu`. With `-v part=micro` those that need no lab; with `-v hardware=1` those of a unit of the
# host's, too.

function both(threads, granule, text) {
    row("unmap-" threads "-" granule, "unmap " text, "us", 10, "ratio", 0.6)
    row("map-" threads "-" granule, "map " text, "us", 10, "ratio", 0.6)
}

function lab(threads,    text) {
    text = threads == 1 ? ", 1 thread" : ", threads " threads""
    both(threads, 1, "4 KiB" text)
    both(threads, 16, "64 KiB" text)
    both(threads, 512, "2 MiB" text)
    # One for the invalidation and one for the wait behind it; a twentieth for all else that exits meanwhile.
    row("exits-" threads "-1", "exits, map and unmap" text, "exits", 100, "value", 2.1)
    row("poll-exits-" threads "-1", "the same, doorbell polled" text, "exits", 100, "value", 0.3)
    row("poll-unmap-" threads "-1", "unmap 4 KiB, polled" text, "us", 10, "", 0)
    # Of one processor.
    row("beside-" threads "-1", "time beside the guest's" text, "%", 10, "", 0)
    row("poll-beside-" threads "-1", "the same, doorbell polled" text, "%", 10, "", 0)
    row("lazy-unmap-" threads "-1", "unmap 4 KiB, lazy" text, "us", 10, "ratio", 0.6)
    row("v2-unmap-" threads "-1", "unmap 4 KiB, v2 tables" text, "us", 10, "", 0)
    served(threads, text)
}

# Before a model of the hardware that serves guests. Its doorbell is its own: hardware has no exit for it.
function served(threads, text) {
    row("sim-unmap-" threads "-1", "sim: unmap 4 KiB" text, "us", 10, "", 0)
    row("sim-map-" threads "-1", "sim: map 4 KiB" text, "us", 10, "", 0)
    row("sim-unmap-" threads "-16", "sim: unmap 64 KiB" text, "us", 10, "", 0)
    row("sim-map-" threads "-16", "sim: map 64 KiB" text, "us", 10, "", 0)
    row("sim-unmap-" threads "-512", "sim: unmap 2 MiB" text, "us", 10, "", 0)
    row("sim-map-" threads "-512", "sim: map 2 MiB" text, "us", 10, "", 0)
    row("sim-lazy-unmap-" threads "-1", "sim: unmap 4 KiB, lazy" text, "us", 10, "", 0)
    row("sim-exits-" threads "-1", "sim: exits, map and unmap" text, "exits", 100, "value", 2.1)
    row("sim-poll-exits-" threads "-1", "sim: the same, polled" text, "exits", 100, "", 0)
    # A twentieth for all else that exits meanwhile.
    row("sim-others-" threads "-1", "sim: the same but doorbells" text, "exits", 100, "value", 0.05)
}

# Behind a unit of the host's, which takes the doorbell, carries commands out and walks tables itself: nothing exits but
# what else the guest does meanwhile.
function by_the_host(threads, text) {
    row("hw-unmap-" threads "-1", "hw: unmap 4 KiB" text, "us", 10, "", 0)
    row("hw-map-" threads "-1", "hw: map 4 KiB" text, "us", 10, "", 0)
    row("hw-unmap-" threads "-16", "hw: unmap 64 KiB" text, "us", 10, "", 0)
    row("hw-map-" threads "-16", "hw: map 64 KiB" text, "us", 10, "", 0)
    row("hw-unmap-" threads "-512", "hw: unmap 2 MiB" text, "us", 10, "", 0)
    row("hw-map-" threads "-512", "hw: map 2 MiB" text, "us", 10, "", 0)
    row("hw-lazy-unmap-" threads "-1", "hw: unmap 4 KiB, lazy" text, "us", 10, "", 0)
    row("hw-exits-" threads "-1", "hw: exits, map and unmap" text, "exits", 100, "value", 0.05)
}

# Beside a boot without a unit. Linux rings about six times for each function number as it starts.
function boot(name, text, others) {
    row("boot-" name "-init-us", "boot to init, " text, "ms", 1000, "", 0)
    row("boot-" name "-exits", "boot, " text, "exits", 1, "", 0)
    row("boot-" name "-doorbells", "its doorbells, " text, "exits", 1, "", 0)
    row("boot-" name "-registers", "other registers, " text, "exits", 1, "value", others)
    row("boot-" name "-entries", "device table, " text, "exits", 1, "value", others)
}

END {
    over = median("ravelin", "access-ps") - median("direct", "access-ps")
    begin_report()
    row("hit-ps", "hit of the cache", "ns", 1000, "value", 10)
    row("guarded-ps", "hit, and its guard", "ns", 1000, "value", 10)
    row("hit-ps", "hit, beside vm-memory", "ns", 1000, "ratio", 0.05, \
        over <= 1500 ? sprintf("%.1f ns over direct access", over / 1000) : "")
    row("access-ps", "hit and access of 8 bytes", "ns", 1000, "", 0)
    row("hit-2-ps", "hit, 2 threads, each", "ns", 1000, "value", 20)
    row("miss-ps", "miss, four levels", "ns", 1000, "value", 150)
    # 15 million a second.
    row("command-ps", "an invalidation command", "ns", 1000, "value", 66.7)
    row("wait-ps", "a command, each second a wait", "ns", 1000, "", 0)
    if (part != "micro") {
        # 1.3 times QEMU's reads in a second, and 0.9 times ours without a unit.
        row("lazy-read", "random read 4 KiB, lazy", "us", 10, "ratio", 0.77)
        row("lazy-read-beside", "the same, beside no unit", "us", 10, "ratio", 1.11)
        row("pt-read-beside", "the same, iommu.passthrough=1", "us", 10, "", 0)
        lab(1)
        lab(2)
        if (hardware) {
            by_the_host(1, ", 1 thread")
            by_the_host(2, ", 2 threads")
        }
        boot("emulated", "emulated", 400)
        boot("sim", "sim", 400)
        boot("sim-poll", "sim, polled", 400)
    }
    end_report()
}
