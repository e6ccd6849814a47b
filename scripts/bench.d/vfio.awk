# The rows of `scripts/bench vfio`.

# Mapping and unmapping, each of which is two commands of the guest's and one run of pages.
function mapped(mode, pages, text) {
    row(mode "-pair-1-" pages, "map and unmap " text, "us", 10, "ratio", 0.5)
    row(mode "-map-1-" pages, "map " text, "us", 10, "", 0)
    row(mode "-unmap-1-" pages, "unmap " text, "us", 10, "", 0)
    row(mode "-exits-1-" pages, "exits for both", "exits", 100, "", 0)
    # A twentieth for all else that exits meanwhile, or asks for something.
    row(mode "-others-1-" pages, "those that are no doorbells", "exits", 100, "value", 0.05)
    row(mode "-requests-1-" pages, "requests to the host for both", "calls", 100, "value", 2.05)
}

function works(prefix, text, limit,    kind) {
    kind = limit ? "ratio" : ""
    row(prefix "ping-ms", "ping" text, "us", 0.001, kind, limit)
    row(prefix "sent-us", "a MiB sent" text, "us", 1, kind, limit)
    row(prefix "received-us", "a MiB received" text, "us", 1, kind, limit)
    row(prefix "read", "random read 4 KiB" text, "us", 10, kind, limit)
}

function started(gib,    text) {
    text = " with " gib " GiB"
    row("entry-" gib "-us", "to the first entry" text, "ms", 1000, "ratio", 1)
    row("init-" gib "-us", "to the guest's init" text, "ms", 1000, "ratio", 1)
}

END {
    begin_report()
    started(1)
    started(8)
    works("", "", 1)
    works("strict-", ", behind a unit", 0)
    mapped("strict", 1, "4 KiB")
    mapped("strict", 512, "2 MiB")
    mapped("lazy", 1, "4 KiB, lazy")
    mapped("lazy", 512, "2 MiB, lazy")
    end_report()
}
