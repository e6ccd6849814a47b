//! A guest that serves a guest of its own by AMD's vIOMMU hardware: everything that a kernel's driver does, from user space,
//! since no kernel that is packaged has such a driver.

use std::time::Duration;

use crate::devices::DISK_TOOLS;
use crate::machine::Machine;

/// Memory that the guest's kernel leaves alone, at 160 MiB, and a unit that it leaves off.
const WORDS: &str = "amd_iommu=off memmap=32M$160M";

/// What both have: memory and registers by 64 bits, each half a number of its own, and where things are.
const PARTS: &str = r#"
# put ADDRESS HIGH LOW
put() { devmem $(($1)) 64 "$(printf 0x%08x%08x $(($2)) $(($3)))"; }
# low ADDRESS, high ADDRESS: either half of what is there.
low() { echo $(($(devmem $(($1)) 32))); }
high() { low "$1 + 4"; }
# is NAME WANTED FOUND
is() { check "$1" test "$(($2))" = "$(($3))"; }

m=$((0xa000000))
# The host's: device table, command ring, event log, a flag; the private address space; tables of both kinds.
table=$m ring=$((m + 0x200000)) log=$((m + 0x201000)) flag=$((m + 0x202000))
dirty=$((m + 0x400000)) devices=$((m + 0x600000)) domains=$((m + 0x800000))
private=$((m + 0x1000000)) parent=$((m + 0x1010000))
interrupts=$((m + 0x1100000)) entries=$((m + 0x1102000)) apic=$((m + 0x1104000))
# The guest's 2 MiB, and what lies in them by its own addresses.
guest=$((m + 0xa00000))
own_ring=0x1000 own_log=0x2000 own_flag=0x3000 gcr3=0x5000 tables=0x6000 source=0x10000
# Its number, what it calls its device and its domain, and what the host calls that domain and its translate device.
id=1 called=0x18 own_domain=9 domain=0x21 translate=0x4801

# The device: one that copies as it is told.
device=$(basename "$(ls -d /sys/bus/pci/drivers/pci-endpoint-test/0*)")
echo "$device" >/sys/bus/pci/drivers/pci-endpoint-test/unbind
setpci -s "$device" COMMAND=6:6
bar=$(($(head -n 1 "/sys/bus/pci/devices/$device/resource" | cut -d ' ' -f 1)))
number=$((0x$(echo "$device" | cut -d : -f 2) << 8))
# copies FROM TO: whether the device did.
copies() {
    for pair in "0x0c $(($1))" "0x10 0" "0x14 $(($2))" "0x18 0" "0x1c 256" "0x24 9" "0x04 0x20"; do
        devmem $((bar + ${pair% *})) 32 "${pair#* }"
    done
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        [ "$(low "bar + 4")" = 0 ] && break
        sleep 1
    done
    [ $(($(low "bar + 8") & 0x30)) = $((0x10)) ]
}
cannot_copy() { ! copies "$@"; }
"#;

/// As the host boots: the extension is found and switched on.
const BOOT: &str = r#"
part() { setpci -s 00:00.2 "CAP$1.L"; }
unit=$((0x$(part 0f+4) & ~1))
is unit_serves_guests 1 "$(high "unit + 0x30") >> 23 & 1"
is roots_by_guest_address 1 "$(low "unit + 0x1a0") >> 3 & 1"
is pages_are_enabled 1 "0x$(part 09+8) & 1"
is control_is_enabled 1 "0x$(part 09+10) & 1"
page=$(((0x$(part 09+c) << 32 | 0x$(part 09+8) & ~1) + id * 0x1000))
control=$(((0x$(part 09+14) << 32 | 0x$(part 09+10) & ~1) + id * 0x40))

# Buffers by guest address: set, and looked for.
put "unit + 0x18" 0x10000000 0
is buffers_by_guest_address 0x10000000 "$(high "unit + 0x18")"

# The private address space has two megabytes of each of its regions, and the unit's own entry leads to it.
link=0x60000000
put private $link "private + 0x1000 | 3 << 9 | 1"
put "private + 0x1000" $link "private + 0x2000 | 2 << 9 | 1"
put "private + 0x1000 + 64 * 8" $link "private + 0x3000 | 2 << 9 | 1"
put "private + 0x1000 + 128 * 8" $link "private + 0x4000 | 2 << 9 | 1"
put "private + 0x2000 + 2 * 8" $link "dirty | 1"
put "private + 0x3000" $link "devices | 1"
put "private + 0x4000" $link "domains | 1"
put interrupts 0 "entries | 1"
# entry NUMBER HIGH0 LOW0 LOW1 HIGH2 LOW2 HIGH3 LOW3
entry() {
    at=$((table + 32 * $1))
    put "at + 24" "$7" "$8"
    put "at + 16" "$5" "$6"
    put "at + 8" 0 "$4"
    put at "$2" "$3"
}
entry 2 $link "private | 4 << 9 | 3" 1 0x20000000 "interrupts | 1" 0 0
put "unit + 0x00" 0 "table | 0x1ff"
put "unit + 0x08" 0x08000000 ring
put "unit + 0x10" 0x08000000 log
# GstBufferTRPMode, GCR3TRPMode, vIommuEn, vCmdEn; GTEn, CmdBufEn, EventLogEn, IommuEn.
put "unit + 0x18" 0x14300000 0x11005
is all_is_on 0x14300000 "$(high "unit + 0x18")"
is rings_run 0x18 "$(low "unit + 0x2020")"

tail=0 sequence=0
# order D0 D1 D2 D3, in the host's ring.
order() {
    put "ring + tail" "$2" "$1"
    put "ring + tail + 8" "$4" "$3"
    tail=$(((tail + 16) % 4096))
    devmem $((unit + 0x2008)) 32 $tail
}
# carried_out NAME: all commands so far are.
carried_out() {
    sequence=$((sequence + 1))
    order "flag | 1" 0x10000000 $sequence 0
    is "$1" $sequence "$(low flag)"
}
invalidate_entry() { order "$1" 0x20000000 0 0; }
invalidate_entry 2
order 2 0x50000000 0 0
carried_out the_unit_has_its_own_entry
"#;

/// A guest comes: its registers, its memory, its names, its device, its rings and its interrupts.
const SERVE: &str = r#"
order "id | 1 << 31" 0xa0000000 0 0
carried_out its_page_is_reset
put parent $link "parent + 0x1000 | 3 << 9 | 1"
put "parent + 0x1000" $link "parent + 0x2000 | 2 << 9 | 1"
put "parent + 0x2000" $link "guest | 1"
entry $translate $link "parent | 4 << 9 | 3" 0x20 0 0 0 0
invalidate_entry $translate
carried_out its_memory_has_a_table
put "control + 0x10" 0 "translate << 16"
# map REGISTER GUESTS HOSTS: bit 63 orders it, bits 61:46 are the guest's number, 29:14 the host's, bit 0 makes it valid.
map() { put "control + $1" "1 << 31 | $2 << 14" "$3 << 14 | 1"; }
map 0x00 $called $number
map 0x08 $own_domain $domain
check its_name_is_in_the_private_space test "$(low "devices + (id << 20) + called * 16")" != 0
check its_domain_is_too test "$(low "domains + (id << 19) + own_domain * 8")" != 0
# The host's table, and under it the guest's: GV, GIOV, the root 5000h; vImuEn and both names.
entry $number "link | 0x00c00000 | 5 << 26" "parent | 4 << 9 | 3" $domain 0 0 $called "id << 16 | 0x8000"
invalidate_entry $number
carried_out its_device_has_tables
# To the virtual APIC: RemapEn, GuestMode, a tag; the vector and the page.
put "entries + id * 16" 0x77 0x81
put "entries + id * 16 + 8" 0 "apic | 0x51"
order 2 0x50000000 0 0
carried_out its_interrupt_has_an_entry
is nothing_runs_yet 0 "$(low "page + 0x20")"
put "control + 0x20" 0 "own_ring | 0x308"
put "control + 0x28" 0 "own_log | 0x308"
is its_rings_run 0x18 "$(low "page + 0x20")"
"#;

/// The guest, which has its page, its memory and its device.
const LIVE: &str = r#"
put "guest + gcr3" 0 "tables | 1"
for level in 0 1 2; do
    put "guest + tables + level * 0x1000" 0 "tables + (level + 1) * 0x1000 | 7"
done
# leaf ADDRESS TARGET: a page of its device's, by the last of its tables; 0 for none.
leaf() { put "guest + tables + 0x3000 + ($1 >> 12) * 8" 0 "$2"; }
leaf 0x1000 "source | 7"
leaf 0x2000 "source + 0x1000 | 7"
own_tail=0
# own_order D0 D1 D2 D3, by its page.
own_order() {
    put "guest + own_ring + own_tail" "$2" "$1"
    put "guest + own_ring + own_tail + 8" "$4" "$3"
    own_tail=$(((own_tail + 16) % 4096))
    devmem $((page + 8)) 32 $own_tail
}
own_flush() { own_order 0 "0x30000000 | own_domain" 0xfffff007 0x7fffffff; }
# own_wait NAME WORD
own_wait() {
    own_order "own_flag | 1" 0x10000000 "$2" 0
    is "$1" "$2" "$(low "guest + own_flag")"
}
put "guest + source" 0x55667788 0x11223344
check its_device_copies copies 0x1000 0x2000
is by_both_tables 0x11223344 "$(low "guest + source + 0x1000")"

leaf 0x2000 "source + 0x2000 | 7"
own_flush
own_wait its_flush_is_over 7
check its_device_copies_again copies 0x1000 0x2000
is to_the_new_page 0x11223344 "$(low "guest + source + 0x2000")"
is its_ring_is_empty $own_tail "$(low page)"
is none_of_it_in_the_hosts_log 0 "$(low "unit + 0x2018")"

# A page that is not there: a record by its own numbers in its own log, and its interrupt.
leaf 0x2000 0
own_flush
own_wait its_page_is_gone 8
put "guest + source + 0x2000" 0 0
check its_device_cannot_copy cannot_copy 0x1000 0x2000
is nothing_is_written 0 "$(low "guest + source + 0x2000")"
is one_record 0x10 "$(low "page + 0x18")"
is about_its_device $called "$(low "guest + own_log") & 0xffff"
is a_page_fault 2 "$(high "guest + own_log") >> 28"
is at_its_address 0x2000 "$(low "guest + own_log + 8")"
is its_log_interrupts 0x2 "$(low "page + 0x20") & 0x2"
is by_its_virtual_apic 0x20000 "$(low "apic + 0x220")"
is still_none_in_the_hosts_log 0 "$(low "unit + 0x2018")"

# Numbers of the host's mean nothing in its ring, and what means nothing at all stops it.
leaf 0x2000 "source + 0x2000 | 7"
own_order 0 "0x30000000 | $domain" 0xfffff007 0x7fffffff
own_order "$number" 0x20000000 0 0
own_wait others_numbers_are_passed_over 9
put "apic + 0x220" 0 0
own_order 0 0 0 0
is its_ring_stops 0x8 "$(low "page + 0x20") & 0x18"
is and_it_is_told 5 "$(high "guest + own_log + 0x10") >> 28"
is the_hosts_ring_goes_on 0x18 "$(low "unit + 0x2020") & 0x18"
# Its driver takes the record, and the ring is switched off and on, past what it was.
devmem $((page + 0x10)) 32 0x20
devmem $((page + 0x20)) 32 0x2
put "control + 0x20" 0 "own_ring | 0x208"
devmem $((page)) 32 0
devmem $((page + 8)) 32 0
own_tail=0
put "control + 0x20" 0 "own_ring | 0x308"
own_wait its_ring_runs_again 10

# A record that the host puts in.
order "1 << 28 | called" "0x90000000 | id" 0x1234 0
carried_out an_event_is_put_in
is three_records 0x30 "$(low "page + 0x18")"
is of_its_code 1 "$(high "guest + own_log + 0x20") >> 28"
is of_its_device $called "$(low "guest + own_log + 0x20") & 0xffff"
"#;

/// The guest goes, in the order of AMD's kernel, and nothing of it stays.
const END: &str = r#"
put "control + 0x20" 0 0
put "control + 0x28" 0 0
is its_rings_are_off 0 "$(low "page + 0x20") & 0x18"
entry $number $link 1 0 0 0 0 0
invalidate_entry $number
map 0x00 $called 0
map 0x08 $own_domain 0
put "control + 0x10" 0 0
entry $translate 0 1 0 0 0 0 0
invalidate_entry $translate
order "id | 1 << 31" 0xa0000000 0 0
carried_out it_is_gone
for register in 0x00 0x08 0x10 0x18 0x20; do
    is "its_page_has_0_at_$register" 0 "$(low "page + $register")"
done
put "guest + own_flag" 0 0
own_tail=0
own_order "own_flag | 1" 0x10000000 11 0
is nobody_listens 0 "$(low "guest + own_flag")"
put "guest + source + 0x2000" 0 0
check the_device_reaches_nothing cannot_copy 0x1000 0x2000
is nothing_is_written_any_more 0 "$(low "guest + source + 0x2000")"
is no_record_of_it_in_its_log 0 "$(high "guest + own_log + 0x30") >> 28"
is but_in_the_hosts $number "$(low log) & 0xffff"

# The unit off: the device is the kernel's again, with all memory untranslated.
put "unit + 0x18" 0 0
check untranslated copies "guest + source" "guest + source + 0x2000"
is memory_itself 0x11223344 "$(low "guest + source + 0x2000")"
check disk_works round_trip "beside a guest of the guest's"
"#;

/// Host boot, a guest's coming, its commands and its device's accesses and faults, its going; each step looked at.
#[test]
fn a_program_serves_a_guest_of_the_guests_from_its_coming_to_its_going() {
    let machine = Machine::new("lab").deadline(Duration::from_secs(300));
    let disk = format!("path={}", machine.disk("disk.img", 16).display());
    machine
        .cmdline(WORDS)
        .arguments(["--cpus", "2", "--memory", "384M", "--disk", &disk])
        .arguments(["--viommu", "mode=emulated,virtualizable=on"])
        .arguments(["--root-port", "rp0", "--test-device", "port=rp0"])
        .guest_program("/usr/bin/setpci")
        .script(&format!("{DISK_TOOLS}{PARTS}{BOOT}{SERVE}{LIVE}{END}"))
        .run()
        .well();
}
