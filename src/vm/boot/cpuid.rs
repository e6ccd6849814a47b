//! What processor the guest sees: KVM's supported leaves with topology, identity and frequency put in.
//!
//! AMD64 Architecture Programmer's Manual volume 3, appendix E; Intel SDM volume 2, CPUID; the hypervisor's
//! leaves: Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

use crate::platform::host::HostError;
use crate::vm::plan::CpuPlan;

/// The leaf has sub-leaves.
const SIGNIFICANT_INDEX: u32 = kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX;

/// Leaf 1, ECX: x2APIC.
const X2APIC: u32 = 1 << 21;
/// Leaf 1, ECX: the APIC timer has a TSC deadline mode.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: several logical processors per package.
const HTT: u32 = 1 << 28;
/// Leaf 7, ECX: linear addresses have 57 bits.
const LA57: u32 = 1 << 16;
/// Leaf 8000_0001h, ECX: several logical processors are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// Leaf 8000_0001h, ECX: leaves 8000_001Dh and 8000_001Eh are there.
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// KVM's features, EAX: interrupt messages carry 15 destination bits (KVM_FEATURE_MSI_EXT_DEST_ID).
const MSI_EXT_DEST_ID: u32 = 1 << 15;

/// KVM's signature leaf.
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// KVM's features.
const KVM_FEATURES: u32 = 0x4000_0001;
/// TSC and APIC timer frequencies, by convention of several hypervisors.
const TIMING: u32 = 0x4000_0010;
/// KVM's local APIC timer counts nanoseconds.
const APIC_TIMER_KHZ: u32 = 1_000_000;

/// How many address bits processors with these leaves have, and the highest address that gives
/// (leaf 8000_0008h, EAX; 36 bits where there is none).
#[must_use]
pub fn address_reach(supported: &CpuId) -> (u32, u64) {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|leaf| leaf.function == 0x8000_0008);
    let bits = leaf.map_or(36, |leaf| leaf.eax & 0xff).clamp(32, 63);
    (bits, (1 << bits) - 1)
}

/// Whether page tables of processors with these leaves may have five levels (leaf 7, ECX: LA57). What KVM supports of that
/// the guest sees.
#[must_use]
pub fn has_five_levels(supported: &CpuId) -> bool {
    let mut leaves = supported.as_slice().iter();
    leaves.any(|leaf| leaf.function == 7 && leaf.index == 0 && leaf.ecx & LA57 != 0)
}

/// What is the same for all processors of a machine.
#[derive(Debug, Clone)]
pub struct Model {
    supported: Vec<kvm_cpuid_entry2>,
    vendor: Vendor,
    sockets: Shape,
    tsc_khz: u32,
    /// Whether devices may use the extended destination format: only where nothing remaps messages.
    extended_destinations: bool,
    starts_in_x2apic: bool,
}

/// The last ID of 8 bits that names one processor.
const LAST_XAPIC_ID: u32 = 0xfe;

/// Whose conventions apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
    Other,
}

/// One package's inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    cores: u32,
    threads: u32,
    thread_bits: u32,
    package_bits: u32,
}

impl Model {
    /// The processor of a machine laid out by `plan`, from the leaves KVM supports here, with a TSC of
    /// `tsc_khz` kHz.
    #[must_use]
    pub fn new(supported: &CpuId, plan: &CpuPlan, tsc_khz: u32, extended_destinations: bool) -> Self {
        let supported = supported.as_slice().to_vec();
        let vendor = supported
            .iter()
            .find(|leaf| leaf.function == 0)
            .map_or(Vendor::Other, |leaf| Vendor::of([leaf.ebx, leaf.edx, leaf.ecx]));
        Self {
            supported,
            vendor,
            sockets: Shape {
                cores: plan.cores,
                threads: plan.threads,
                thread_bits: plan.thread_bits(),
                package_bits: plan.package_shift(),
            },
            tsc_khz,
            extended_destinations,
            starts_in_x2apic: plan.apic_ids.iter().any(|id| *id > LAST_XAPIC_ID),
        }
    }

    /// Whether processors start with their local APICs in x2APIC mode, as firmware leaves them where one has an ID
    /// that the other mode cannot express. Linux ignores such processors otherwise.
    #[must_use]
    pub const fn starts_in_x2apic(&self) -> bool {
        self.starts_in_x2apic
    }

    /// The leaves of the processor with APIC ID `apic_id`.
    ///
    /// # Errors
    /// When there are more leaves than the kernel takes.
    pub fn leaves(&self, apic_id: u32) -> Result<CpuId, HostError> {
        let mut leaves = Leaves(self.supported.clone());
        self.identify(&mut leaves, apic_id);
        self.topology(&mut leaves, apic_id);
        self.caches(&mut leaves);
        self.hypervisor(&mut leaves);
        leaves.0.sort_unstable_by_key(|leaf| (leaf.function, leaf.index));
        CpuId::from_entries(&leaves.0).map_err(|_| {
            HostError::new(
                format!("describe a processor with {} CPUID leaves", leaves.0.len()),
                std::io::Error::from(std::io::ErrorKind::InvalidInput),
            )
        })
    }

    fn identify(&self, leaves: &mut Leaves, apic_id: u32) {
        let shape = self.sockets;
        let per_package = shape.per_package();
        if let Some(leaf) = leaves.get(1) {
            // Eight bits each: what does not fit is told by the topology leaves.
            let count = (1_u32 << shape.package_bits).min(255);
            leaf.ebx = leaf.ebx & 0x0000_ffff | (apic_id & 0xff) << 24 | count << 16;
            leaf.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            set(&mut leaf.edx, HTT, per_package > 1);
        }
        if let Some(leaf) = leaves.get(0x8000_0001) {
            set(
                &mut leaf.ecx,
                CMP_LEGACY,
                self.vendor == Vendor::Amd && per_package > 1,
            );
        }
        if let Some(leaf) = leaves.get(0x8000_0008).filter(|_| self.vendor == Vendor::Amd) {
            leaf.ecx = (per_package - 1).min(0xff) | shape.package_bits.min(0xf) << 12;
        }
    }

    fn topology(&self, leaves: &mut Leaves, apic_id: u32) {
        let shape = self.sockets;
        // The extended topology leaf is what guests of both vendors read first; KVM does not fill it in.
        let mut functions = vec![0xb];
        if leaves.has(0x1f) {
            functions.push(0x1f);
        }
        for function in functions {
            leaves.remove(function);
            // Level types: 1 threads, 2 cores, 0 the end.
            let levels = [
                (shape.thread_bits, shape.threads, 1),
                (shape.package_bits, shape.per_package(), 2),
                (0, 0, 0),
            ];
            for (index, (shift, count, kind)) in (0..).zip(levels) {
                leaves.0.push(kvm_cpuid_entry2 {
                    function,
                    index,
                    flags: SIGNIFICANT_INDEX,
                    eax: shift,
                    ebx: count,
                    ecx: index | kind << 8,
                    edx: apic_id,
                    ..Default::default()
                });
            }
            leaves.reach(0, function);
        }
        // AMD's own extended topology leaf would contradict unless it too were filled in; leaf Bh says it all.
        leaves.remove(0x8000_0026);
        let extended = leaves
            .get(0x8000_0001)
            .is_some_and(|leaf| leaf.ecx & TOPOLOGY_EXTENSIONS != 0);
        leaves.remove(0x8000_001e);
        if self.vendor == Vendor::Amd && extended {
            let core = apic_id >> shape.thread_bits & 0xff;
            let node = apic_id >> shape.package_bits & 0xff;
            leaves.0.push(kvm_cpuid_entry2 {
                function: 0x8000_001e,
                eax: apic_id,
                ebx: core | (shape.threads - 1).min(0xff) << 8,
                ecx: node,
                ..Default::default()
            });
            leaves.reach(0x8000_0000, 0x8000_001e);
        }
    }

    /// Who shares each cache: the first two levels a core's threads, the third a package.
    fn caches(&self, leaves: &mut Leaves) {
        let shape = self.sockets;
        let function = match self.vendor {
            Vendor::Amd => 0x8000_001d,
            _ => 4,
        };
        for leaf in leaves.0.iter_mut().filter(|leaf| leaf.function == function) {
            // Type 0 ends the list.
            if leaf.eax & 0x1f == 0 {
                continue;
            }
            let level = leaf.eax >> 5 & 7;
            let sharing_bits = match level {
                1 | 2 => shape.thread_bits,
                _ => shape.package_bits,
            };
            let sharing = ((1_u32 << sharing_bits) - 1).min(0xfff);
            leaf.eax = leaf.eax & !0x03ff_c000 | sharing << 14;
            if self.vendor == Vendor::Intel {
                let core_bits = shape.package_bits - shape.thread_bits;
                let cores = ((1_u32 << core_bits) - 1).min(0x3f);
                leaf.eax = leaf.eax & 0x03ff_ffff | cores << 26;
            }
        }
    }

    fn hypervisor(&self, leaves: &mut Leaves) {
        leaves.reach(KVM_SIGNATURE, TIMING);
        leaves.remove(TIMING);
        leaves.0.push(kvm_cpuid_entry2 {
            function: TIMING,
            eax: self.tsc_khz,
            ebx: APIC_TIMER_KHZ,
            ..Default::default()
        });
        if let Some(leaf) = leaves.get(KVM_FEATURES) {
            set(&mut leaf.eax, MSI_EXT_DEST_ID, self.extended_destinations);
        }
        if self.vendor == Vendor::Intel {
            // TSC = crystal x EBX / EAX; the crystal also drives the APIC timer, so it must be KVM's.
            leaves.remove(0x15);
            leaves.0.push(kvm_cpuid_entry2 {
                function: 0x15,
                eax: APIC_TIMER_KHZ,
                ebx: self.tsc_khz,
                ecx: APIC_TIMER_KHZ * 1000,
                ..Default::default()
            });
            leaves.reach(0, 0x15);
        }
    }
}

impl Vendor {
    fn of(name: [u32; 3]) -> Self {
        let text = name.map(u32::to_le_bytes).concat();
        match text.as_slice() {
            b"AuthenticAMD" | b"HygonGenuine" => Self::Amd,
            b"GenuineIntel" => Self::Intel,
            _ => Self::Other,
        }
    }
}

impl Shape {
    /// Logical processors in one package.
    fn per_package(self) -> u32 {
        self.cores.saturating_mul(self.threads)
    }
}

/// Leaves in the making.
struct Leaves(Vec<kvm_cpuid_entry2>);

impl Leaves {
    /// Sub-leaf 0 of `function`.
    fn get(&mut self, function: u32) -> Option<&mut kvm_cpuid_entry2> {
        self.0
            .iter_mut()
            .find(|leaf| leaf.function == function && leaf.index == 0)
    }

    fn has(&self, function: u32) -> bool {
        self.0.iter().any(|leaf| leaf.function == function)
    }

    fn remove(&mut self, function: u32) {
        self.0.retain(|leaf| leaf.function != function);
    }

    /// Let the leaf `base` say that functions go up to at least `function`.
    fn reach(&mut self, base: u32, function: u32) {
        if let Some(leaf) = self.get(base) {
            leaf.eax = leaf.eax.max(function);
        }
    }
}

/// Set or clear the bits `mask`.
fn set(register: &mut u32, mask: u32, on: bool) {
    match on {
        true => *register |= mask,
        false => *register &= !mask,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AMD: [u32; 3] = [0x6874_7541, 0x6974_6e65, 0x444d_4163];
    const INTEL: [u32; 3] = [0x756e_6547, 0x4965_6e69, 0x6c65_746e];

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    #[test]
    fn five_levels_are_told_by_one_bit_of_the_leaf_without_index() {
        let with = |leaves: &[kvm_cpuid_entry2]| {
            let leaves = CpuId::from_entries(leaves).expect("few");
            has_five_levels(&leaves)
        };
        assert!(with(&[leaf(7, 0, [0, 0, 1 << 16, 0])]));
        assert!(!with(&[
            leaf(7, 0, [!0, !0, !(1 << 16), !0]),
            leaf(7, 1, [!0; 4])
        ]));
        assert!(!with(&[leaf(1, 0, [!0; 4])]));
    }

    fn plan(sockets: u32, cores: u32, threads: u32) -> CpuPlan {
        let count = sockets * cores * threads;
        CpuPlan {
            count,
            sockets,
            cores,
            threads,
            apic_ids: (0..count).collect(),
            pinning: Vec::new(),
        }
    }

    fn model([ebx, edx, ecx]: [u32; 3], plan: &CpuPlan) -> Model {
        let supported = [
            leaf(0, 0, [0x10, ebx, ecx, edx]),
            leaf(1, 0, [0x00a2_0f10, 0x0108_0800, 0, 0]),
            leaf(4, 0, [0x121, 0, 0, 0]),
            leaf(4, 3, [0x163, 0, 0, 0]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(0xb, 0, [9, 9, 9, 9]),
            leaf(KVM_SIGNATURE, 0, [KVM_FEATURES, 0, 0, 0]),
            leaf(KVM_FEATURES, 0, [0x0100_7efb, 0, 0, 0]),
            leaf(0x8000_0000, 0, [0x8000_001f, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, TOPOLOGY_EXTENSIONS, 0]),
            leaf(0x8000_0008, 0, [0x3030, 0, 0, 0]),
            leaf(0x8000_001d, 0, [0x121, 0, 0, 0]),
            leaf(0x8000_001d, 3, [0x163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [7, 7, 7, 7]),
            leaf(0x8000_0026, 0, [7, 7, 7, 7]),
        ];
        let supported = CpuId::from_entries(&supported).expect("a few leaves");
        Model::new(&supported, plan, 2_000_000, true)
    }

    fn find(leaves: &CpuId, function: u32, index: u32) -> [u32; 4] {
        let found = leaves
            .as_slice()
            .iter()
            .find(|leaf| (leaf.function, leaf.index) == (function, index));
        let leaf = found.expect("the leaf is there");
        [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
    }

    #[test]
    fn x2apic_is_on_from_the_start_where_an_id_needs_it() {
        let starts = |plan: &CpuPlan| model(AMD, plan).starts_in_x2apic();
        assert!(!starts(&plan(1, 255, 1)));
        assert!(starts(&plan(1, 256, 1)));
    }

    fn amd(apic_id: u32) -> CpuId {
        // 2 sockets of 3 cores of 2 threads: 1 + 2 bits per package.
        model(AMD, &plan(2, 3, 2)).leaves(apic_id).expect("few leaves")
    }

    #[test]
    fn the_topology_leaf_gives_shifts_counts_and_the_full_apic_id() {
        let leaves = amd(11);
        assert_eq!(find(&leaves, 0xb, 0), [1, 2, 0x100, 11]);
        assert_eq!(find(&leaves, 0xb, 1), [3, 6, 0x201, 11]);
        assert_eq!(find(&leaves, 0xb, 2), [0, 0, 2, 11]);
    }

    #[test]
    fn leaf_1_says_who_and_under_what_the_processor_runs() {
        let [_, ebx, ecx, edx] = find(&amd(11), 1, 0);
        assert_eq!(ebx, 0x0b08_0800);
        assert_eq!(ecx, X2APIC | TSC_DEADLINE | HYPERVISOR);
        assert_eq!(edx, HTT);
    }

    #[test]
    fn an_apic_id_beyond_8_bits_is_told_in_full_where_there_is_room() {
        let leaves = amd(0x1234);
        assert_eq!(find(&leaves, 1, 0)[1] >> 24, 0x34);
        assert_eq!(find(&leaves, 0xb, 0)[3], 0x1234);
        assert_eq!(find(&leaves, 0x8000_001e, 0)[0], 0x1234);
    }

    #[test]
    fn amds_leaves_count_threads_cores_and_nodes() {
        let leaves = amd(11);
        // 6 logical processors in a package numbered by 3 bits.
        assert_eq!(find(&leaves, 0x8000_0008, 0)[2], 0x3005);
        // APIC ID 11: socket 1, core 1, thread 1.
        assert_eq!(find(&leaves, 0x8000_001e, 0), [11, 0x105, 1, 0]);
        assert_eq!(find(&leaves, 0x8000_0001, 0)[2], TOPOLOGY_EXTENSIONS | CMP_LEGACY);
        assert!(!leaves.as_slice().iter().any(|leaf| leaf.function == 0x8000_0026));
    }

    #[test]
    fn inner_caches_are_a_cores_and_the_outer_a_packages() {
        let leaves = amd(0);
        assert_eq!(find(&leaves, 0x8000_001d, 0)[0], 0x121 | 1 << 14);
        assert_eq!(find(&leaves, 0x8000_001d, 3)[0], 0x163 | 7 << 14);
    }

    #[test]
    fn intels_cache_leaves_count_cores_too() {
        let leaves = model(INTEL, &plan(1, 4, 2)).leaves(0).expect("few leaves");
        assert_eq!(find(&leaves, 4, 0)[0], 0x121 | 1 << 14 | 3 << 26);
        assert_eq!(find(&leaves, 4, 3)[0], 0x163 | 7 << 14 | 3 << 26);
        assert_eq!(find(&leaves, 4, 4)[0], 0);
    }

    #[test]
    fn the_guest_is_told_its_frequencies() {
        let leaves = model(INTEL, &plan(1, 1, 1)).leaves(0).expect("few leaves");
        assert_eq!(find(&leaves, TIMING, 0)[..2], [2_000_000, 1_000_000]);
        assert_eq!(find(&leaves, KVM_SIGNATURE, 0)[0], TIMING);
        assert_eq!(find(&leaves, 0x15, 0), [1_000_000, 2_000_000, 1_000_000_000, 0]);
        assert_eq!(find(&leaves, 0, 0)[0], 0x15);
    }

    #[test]
    fn a_lone_processor_has_no_siblings() {
        let leaves = model(AMD, &plan(1, 1, 1)).leaves(0).expect("few leaves");
        assert_eq!(find(&leaves, 1, 0)[3] & HTT, 0);
        assert_eq!(find(&leaves, 0x8000_0001, 0)[2] & CMP_LEGACY, 0);
        assert_eq!(find(&leaves, 0xb, 0), [0, 1, 0x100, 0]);
    }

    #[test]
    fn extended_destinations_are_offered_only_where_nothing_remaps() {
        let mut model = model(AMD, &plan(1, 1, 1));
        let offered =
            |model: &Model| find(&model.leaves(0).expect("few"), KVM_FEATURES, 0)[0] & MSI_EXT_DEST_ID;
        assert_eq!(offered(&model), MSI_EXT_DEST_ID);
        model.extended_destinations = false;
        assert_eq!(offered(&model), 0);
    }

    #[test]
    fn the_highest_address_follows_from_the_address_bits() {
        let with = |eax| CpuId::from_entries(&[leaf(0x8000_0008, 0, [eax, 0, 0, 0])]).expect("one leaf");
        assert_eq!(address_reach(&with(0x3030)), (48, 0xffff_ffff_ffff));
        assert_eq!(address_reach(&with(0)), (32, 0xffff_ffff));
        assert_eq!(address_reach(&with(0xff)), (63, i64::MAX as u64));
    }

    #[test]
    fn the_largest_package_fits_every_field() {
        let leaves = model(AMD, &plan(1, 512, 2)).leaves(1023).expect("few leaves");
        assert_eq!(find(&leaves, 1, 0)[1] >> 16 & 0xff, 255);
        assert_eq!(find(&leaves, 0x8000_0008, 0)[2], 0xa0ff);
        assert_eq!(find(&leaves, 0xb, 1), [10, 1024, 0x201, 1023]);
        assert_eq!(find(&leaves, 0x8000_001d, 3)[0] >> 14 & 0xfff, 0x3ff);
    }
}
