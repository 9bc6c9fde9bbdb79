// SPDX-License-Identifier: GPL-2.0-only
//
// Captures every write of the protected disks. The kernel side filters, copies and counts; nothing else.
// Rules R1, R2, R4, R6, R7 of docs/ARCHITECTURE.md are kept here; the numbers in the comments are theirs.
//
// A write is in exactly one of these when its completion is visible to anyone:
//   data     its bytes are in the ring, and its request is in `inflight` without MISSED until it completes;
//   bitmap   its granules are set in `granules.dirty`;
//   lost     its volume's `lost` word is not zero.
// Whatever this program does not recognise ends as bitmap or lost, never as neither: completion marks every write
// that it does not find in `inflight`.

#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

char LICENSE[] SEC("license") = "GPL";

/* ---- shared with user space: crates/capture/src/layout.rs asserts the same sizes ---- */

#define VOLUMES_MAX 64
#define PAGE_BYTES 4096     /* the most that one step copies */
#define BUCKETS 8192        /* of 8 requests each: 65,536 requests in flight */
#define WALK_STEPS_MAX 8192 /* bios and pages of one request */
#define RANGE_WORDS_MAX 2048 /* bitmap words of one request: 8 GiB */
#define SUSPECTS_MAX 256    /* slots looked at in one run */

enum kind { KIND_DATA = 1, KIND_ZEROES = 2, KIND_DISCARD = 3 };
enum { RECORD_FIRST = 1, RECORD_LAST = 2 };

struct record {
	__u64 sector;   /* 512-byte sectors from the start of the disk */
	__u32 length;   /* bytes; of data that follow, or of the range */
	__u16 volume;
	__u8 kind;
	__u8 flags;
	__u32 lane;     /* records of one request share a lane and are not mixed with others' in it */
	__u32 reserved;
};

struct volume {
	__u64 first_word; /* of this volume's bits in `granules` */
	__u64 granules;
	__u32 index;
	__u32 dev;
	/* For user space: which disk this is, so that an agent that starts again can tell. */
	__u8 id[16];
	__u64 disk_sequence;
	__u64 bytes;
};

struct granule_word {
	__u64 dirty;
	__u64 draining;
	__u64 suspect; /* user space's: to be compared before it is sent */
};

/* Granules that were consumed from the ring or drained, and of which nobody has said yet that they are held durably. */
struct touched_word {
	__u64 bits[2]; /* `kept.young` says which of them is being filled */
};

struct control {
	__u64 phase;       /* lowest bit: goes into the slots of new captured writes */
	__u64 data_mode;   /* 0: bitmap only */
	__u64 vmemmap;     /* address of the first struct page */
	__u64 direct_map;  /* address of page frame 0 */
	__u64 page_struct_shift;
	__u64 page_shift;
};

/* What user space keeps over a restart of its own. */
struct kept { /* 128 bytes */
	__u64 layout;       /* of all maps; set last, when the programs are attached and everything else is here */
	__u64 object;       /* hash of the programs */
	__u64 ring_bytes;
	__u64 generation;
	__u64 numbered;     /* the last epoch that was given a number */
	__u64 acknowledged; /* the last that is held durably elsewhere */
	__u64 skipped_seen; /* what has been acted on of the kernel's counts of skipped runs */
	__u64 deep_seen;
	__u64 young;
	__u64 reserved[7];
};

struct counters { /* one a CPU, 256 bytes, written by that CPU only */
	__u64 marked;        /* granules marked dirty; counted before the bits are set, so never too low */
	__u64 marked_again;  /* of those, such as were dirty already; counted after */
	__u64 data_writes;
	__u64 data_bytes;
	__u64 zero_writes;
	__u64 missed_dirty;  /* issued into a dirty or draining granule */
	__u64 missed_ring;   /* ring full */
	__u64 missed_slot;   /* too many in flight in one bucket */
	__u64 missed_copy;   /* data could not be read, or not be trusted */
	__u64 missed_requeue;
	__u64 unseen;        /* completed without a slot: missed at issue, or issued before we attached */
	__u64 failed;        /* completed with an error */
	__u64 lost;
	__u64 complete_handled; /* the request whose completion a copy of the program has just handled */
	__u64 complete_passed;  /* and one of a disk that is not protected */
	__u64 complete_busy;    /* copies that are running on this CPU, as bits */
	__u64 reserved0;
	__u64 rescued;          /* events that a later copy handled because an earlier one was already running */
	__u64 deep;             /* completions handled by the only copy that was free: one level more would be lost */
	__u64 address[8];       /* where each program turns a pointer into a number; it never runs twice on one CPU */
	__u64 reserved[5];
};

struct calibration {
	__u64 dev;
	__u64 sector;
	__u64 pfn;
	__u64 magic[2];
	__u64 page;        /* out: address of the struct page that the read was issued with */
	__u64 page_offset; /* out */
	__u64 direct_map;  /* in: 0 = search; out */
	__u64 page_struct_bytes; /* out */
	__u64 found;       /* out: the magic bytes were seen */
	__u64 page_shift;
	__u64 request;     /* where a pointer becomes a number */
};

/* A slot that user space wants looked at. */
struct suspect {
	__u64 value;  /* in: what the slot holds; 0 ends the list */
	__u32 place;  /* in: bucket * 8 + slot */
	__u32 mend;   /* in: 0: if it is stale, doubt it; 1: if it is doubted and stale, mark what it writes and free it */
	__u32 stale;  /* out */
	__u32 volume; /* out, if it is stale: the place of its volume, or VOLUMES_MAX */
	__u64 sectors; /* out, if it is stale: how many have ended */
};

/* Of each volume: what the kernel has counted of writes that ended, and what we have. */
struct ledger {
	__u64 base;   /* user space's: by how many sectors the kernel's count may be ahead of ours */
	__u64 mended; /* sectors of writes whose end nobody saw, found by their slots; in `ended` too */
};

enum { LOST_PASSTHROUGH = 1, LOST_RANGE = 2, LOST_WALK = 4, LOST_OPERATION = 8, LOST_STALE = 16 };

struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 20); } ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, VOLUMES_MAX); __type(key, __u32); __type(value, struct volume); } volumes SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct granule_word); } granules SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct touched_word); } touched SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct kept); } kept SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, VOLUMES_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, __u64); } lost SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct control); } control SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct counters); } counters SEC(".maps");
struct flight { /* what a slot's request writes; 0 bytes: not told */
	__u64 sector;
	__u32 bytes;
	__u32 dev; /* disks may share their requests */
};
struct bucket { __u64 slot[8]; struct flight flight[8]; };
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, BUCKETS); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct bucket); } inflight SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, struct calibration); } calibration SEC(".maps");
/* Sectors whose end was seen: VOLUMES_MAX of each CPU. */
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, VOLUMES_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, __u64); } ended SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, VOLUMES_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct ledger); } ledger SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, SUSPECTS_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct suspect); } suspects SEC(".maps");

#define LOAD(x) (*(volatile __u64 *)&(x))
#define STORE(x, value) (*(volatile __u64 *)&(x) = (value))

/* ---- which disk ---- */

static __always_inline __u32 device_of(struct request *rq)
{
	struct gendisk *disk = rq->q->disk;

	/* A load through a null pointer gives 0 here, and no disk has that number. */
	return (__u32)disk->major << 20 | (__u32)disk->first_minor;
}

static __always_inline struct volume *volume_of(struct request *rq)
{
	__u32 dev = device_of(rq);

	return dev ? bpf_map_lookup_elem(&volumes, &dev) : 0;
}

static __always_inline struct counters *counters_here(void)
{
	__u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&counters, &cpu);
}

/* ---- granule bits ---- */

struct range {
	__u64 first_word, first, last; /* granules, inclusive, within the volume */
	__u64 word;                    /* the next word to look at, of the volume */
	struct counters *here;
	__u32 hit, failed;
};

static __always_inline __u64 range_mask(struct range *r, __u64 word)
{
	__u64 mask = ~0ULL;

	if (word == r->first >> 6)
		mask &= ~0ULL << (r->first & 63);
	if (word == r->last >> 6)
		mask &= ~0ULL >> (63 - (r->last & 63));
	return mask;
}

static __always_inline __u64 popcount(__u64 x)
{
	x -= x >> 1 & 0x5555555555555555ULL;
	x = (x & 0x3333333333333333ULL) + (x >> 2 & 0x3333333333333333ULL);
	x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return x * 0x0101010101010101ULL >> 56;
}

static long test_word(__u32 i, struct range *r)
{
	__u64 word = r->word;
	__u32 key = r->first_word + word;
	struct granule_word *bits;

	if (word > r->last >> 6)
		return 1;
	bits = bpf_map_lookup_elem(&granules, &key);
	if (!bits || (*(volatile __u64 *)&bits->dirty | *(volatile __u64 *)&bits->draining) & range_mask(r, word)) {
		r->hit = 1;
		return 1;
	}
	r->word = word + 1;
	return 0;
}

static long mark_word(__u32 i, struct range *r)
{
	__u64 word = r->word, mask, before;
	__u32 key = r->first_word + word;
	struct granule_word *bits;

	if (word > r->last >> 6)
		return 1;
	bits = bpf_map_lookup_elem(&granules, &key);
	if (!bits || !r->here) {
		r->failed = 1;
		return 1;
	}
	mask = range_mask(r, word);
	/* Already dirty: its bit goes before the disk is read, so that read will see this write, which has ended. */
	if ((*(volatile __u64 *)&bits->dirty & mask) == mask) {
		r->word = word + 1;
		return 0;
	}
	/* Counted first, corrected after: a reader may see too many, never too few. */
	__sync_fetch_and_add(&r->here->marked, popcount(mask));
	before = __sync_fetch_and_or(&bits->dirty, mask);
	if (before & mask)
		__sync_fetch_and_add(&r->here->marked_again, popcount(before & mask));
	r->word = word + 1;
	return 0;
}

/* The granules of a range of sectors; 0 when it does not lie within the volume. */
static __always_inline int range_of(struct volume *v, __u64 sector, __u64 bytes, struct range *r)
{
	__u64 end = sector + ((bytes + 511) >> 9);

	r->first_word = v->first_word;
	r->first = sector >> 7;
	r->last = (end - 1) >> 7;
	r->word = r->first >> 6;
	r->hit = 0;
	r->failed = 0;
	return bytes && r->first <= r->last && r->last < v->granules;
}

static __always_inline int any_set(struct volume *v, __u64 sector, __u64 bytes)
{
	struct range r = {};

	if (!range_of(v, sector, bytes, &r))
		return 1;
	if (!test_word(0, &r) && r.word <= r.last >> 6)
		bpf_loop(RANGE_WORDS_MAX, test_word, &r, 0);
	return r.hit || r.word <= r.last >> 6;
}

static __always_inline void set_lost(struct volume *v, struct counters *here, __u64 why)
{
	__u32 index = v->index;
	__u64 *word = bpf_map_lookup_elem(&lost, &index);

	if (word)
		__sync_fetch_and_or(word, why);
	if (here)
		__sync_fetch_and_add(&here->lost, 1);
}

static __always_inline void mark(struct volume *v, struct counters *here, __u64 sector, __u64 bytes)
{
	struct range r = {};

	r.here = here;
	if (!range_of(v, sector, bytes, &r)) {
		set_lost(v, here, LOST_RANGE); /* a write that is nowhere on the disk as we know it */
		return;
	}
	if (!mark_word(0, &r) && r.word <= r.last >> 6)
		bpf_loop(RANGE_WORDS_MAX, mark_word, &r, 0);
	if (r.failed || r.word <= r.last >> 6)
		set_lost(v, here, LOST_RANGE);
}

/* The kernel adds the same number to the disk's statistics before anyone can see the end (blk_account_io_completion). */
static __always_inline void count_ended(struct volume *v, __u64 sectors)
{
	__u32 key = bpf_get_smp_processor_id() * VOLUMES_MAX + v->index;
	__u64 *count = bpf_map_lookup_elem(&ended, &key);

	if (count)
		__sync_fetch_and_add(count, sectors);
}

static __always_inline int is_ranges(__u32 op)
{
	return op == REQ_OP_DISCARD || op == REQ_OP_SECURE_ERASE || op == REQ_OP_WRITE_ZEROES;
}

/* ---- requests in flight ----
 *
 * A write claims a slot, with a full barrier, before it looks at the granules' bits, and leaves it when it completes. So
 * when user space has set bits, every captured write that did not see them is in a slot then (R4).
 *
 * A write whose completion was not seen leaves its slot behind. Whoever uses that request next finds it, and marks what
 * that write wrote; so does user space, which looks for such slots when the kernel has counted more ends than we have.
 * Each such write is to be counted once: counted twice, it would hide another. So user space first says that it doubts
 * a slot, then lets all programs end, and frees the slot only if nobody has used it again, which ends the doubt.
 */

#define SLOT_PHASE 1ULL
#define SLOT_MISSED 2ULL
#define SLOT_REQUEUED 4ULL /* it went back, and has not been issued again yet */
#define SLOT_DOUBTED 8ULL  /* found stale, and not used again since */
#define SLOT_FLAGS 15ULL

static __always_inline struct bucket *bucket_of(__u64 address)
{
	__u32 key = (address >> 6) * 0x9e3779b97f4a7c15ULL >> 40 & (BUCKETS - 1);

	return bpf_map_lookup_elem(&inflight, &key);
}

struct slot {
	__u64 *value;          /* 0: none */
	struct flight *flight;
};

static __always_inline struct slot slot_find(struct bucket *b, __u64 address)
{
	struct slot found = {};

#pragma unroll
	for (int i = 0; i < 8; i++)
		if (!found.value && (*(volatile __u64 *)&b->slot[i] & ~SLOT_FLAGS) == address) {
			found.value = &b->slot[i];
			found.flight = &b->flight[i];
		}
	return found;
}

static __always_inline struct slot slot_claim(struct bucket *b, __u64 value)
{
	struct slot claimed = {};

#pragma unroll
	for (int i = 0; i < 8; i++)
		if (!claimed.value && !*(volatile __u64 *)&b->slot[i] &&
		    __sync_val_compare_and_swap(&b->slot[i], 0, value) == 0) {
			claimed.value = &b->slot[i];
			claimed.flight = &b->flight[i];
		}
	return claimed;
}

/* Takes over the slot of an earlier use of the request: what it was, or 0 when user space has just freed it. */
static __always_inline __u64 slot_reuse(struct slot slot, __u64 address)
{
	__u64 before, reused = 0;

#pragma unroll
	for (int i = 0; i < 4; i++) {
		before = LOAD(*slot.value);
		if (!reused && (before & ~SLOT_FLAGS) == address &&
		    __sync_val_compare_and_swap(slot.value, before,
						(before | SLOT_MISSED) & ~(SLOT_REQUEUED | SLOT_DOUBTED)) == before)
			reused = before;
	}
	return reused;
}

static __always_inline void flight_note(struct flight *flight, struct volume *v, struct request *rq, __u32 op,
					__u32 bytes)
{
	flight->dev = v->dev;
	flight->sector = rq->__sector;
	/* Ranges that were merged into one request need not lie together. */
	flight->bytes = op == REQ_OP_WRITE || (is_ranges(op) && !rq->bio->bi_next) ? bytes : 0;
}

/* Nobody saw the end of what the slot was claimed for, or it ended in some other way: it may be on the disk or not. */
static __always_inline void flight_mark(struct flight *flight, struct counters *here)
{
	__u32 dev = flight->dev;
	struct volume *v = bpf_map_lookup_elem(&volumes, &dev);

	if (!v) /* no longer protected */
		return;
	if (flight->bytes)
		mark(v, here, flight->sector, flight->bytes);
	else
		set_lost(v, here, LOST_STALE);
}

/* The end of that write, or of so many bytes of it, was not seen by count_ended. */
static __always_inline void flight_ended(struct flight *flight, __u32 bytes)
{
	__u32 dev = flight->dev, index;
	struct volume *v = bpf_map_lookup_elem(&volumes, &dev);
	struct ledger *l;

	if (!v)
		return;
	index = v->index;
	count_ended(v, bytes >> 9);
	l = bpf_map_lookup_elem(&ledger, &index);
	if (l)
		__sync_fetch_and_add(&l->mended, bytes >> 9);
}

static __always_inline void slot_free(__u64 *slot)
{
	__sync_lock_test_and_set(slot, 0);
}

/* ---- copying ---- */

enum { COPY_OK = 0, COPY_RING_FULL = 1, COPY_UNREADABLE = 2 };

/* Kept in a map, one a CPU: what the verifier reads from there it takes for anything, so it need
 * not follow each way through the loops. */
struct walk { /* 96 bytes */
	__u64 bio, vec;    /* addresses */
	__u64 vmemmap, direct_map, sector;
	__u64 from;        /* address of what is next in the vector */
	__u32 here;        /* bytes left there */
	__u32 page_struct_shift, page_shift;
	__u32 done;        /* in the bio's first vector */
	__u32 in_bio;      /* bytes left in this bio, with those in `here` */
	__u32 left;        /* bytes left in the request */
	__u32 filled;      /* of the record */
	__u32 lane;
	__u32 volume, flags, failed, reserved;
};

struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 2); __type(key, __u32); __type(value, struct walk); } walks SEC(".maps");

struct copying {
	struct walk *walk;
};

/* The next bytes that lie together: how many, at most a page; 0 when there is none at this step, or a failure. */
static __always_inline __u32 next_part(struct walk *w)
{
	struct bio_vec vec;
	__u32 n;

	if (!w->here) {
		if (!w->in_bio) {
			struct bio *bio = (struct bio *)w->bio;

			bio = BPF_CORE_READ(bio, bi_next);
			if (!bio) {
				w->failed = COPY_UNREADABLE;
				return 0;
			}
			w->bio = (__u64)bio;
			w->vec = (__u64)(BPF_CORE_READ(bio, bi_io_vec) + BPF_CORE_READ(bio, bi_iter.bi_idx));
			w->done = BPF_CORE_READ(bio, bi_iter.bi_bvec_done);
			w->in_bio = BPF_CORE_READ(bio, bi_iter.bi_size);
		}
		if (bpf_probe_read_kernel(&vec, sizeof(vec), (void *)w->vec)) {
			w->failed = COPY_UNREADABLE;
			return 0;
		}
		w->vec += sizeof(vec);
		if (w->done > vec.bv_len) {
			w->failed = COPY_UNREADABLE;
			return 0;
		}
		w->here = vec.bv_len - w->done;
		w->from = (((__u64)vec.bv_page - w->vmemmap) >> w->page_struct_shift << w->page_shift) + w->direct_map +
			  vec.bv_offset + w->done;
		w->done = 0;
		if (w->here > w->in_bio)
			w->here = w->in_bio;
	}
	n = w->here;
	if (n > w->left)
		n = w->left;
	if (n > PAGE_BYTES)
		n = PAGE_BYTES;
	if (n & 511) /* a page boundary inside a sector: no sector of it could be recorded whole */
		w->failed = COPY_UNREADABLE;
	return n;
}

/* One record of up to BYTES, filled in up to STEPS steps. 1: no more records. */
#define COPY_RECORD(NAME, BYTES, STEPS)                                                                          \
static __always_inline long NAME(struct walk *w)                                                                \
{                                                                                                                \
	struct { struct record record; __u8 data[BYTES]; } *piece = bpf_ringbuf_reserve(&ring, sizeof(*piece), 0);  \
	__u32 filled, n;                                                                                            \
                                                                                                                 \
	if (!piece) {                                                                                               \
		w->failed = COPY_RING_FULL;                                                                             \
		return 1;                                                                                               \
	}                                                                                                           \
	w->filled = 0;                                                                                              \
	for (int step = 0; step < STEPS; step++) {                                                                  \
		filled = *(volatile __u32 *)&w->filled;                                                                 \
		if (!w->left || filled > BYTES - PAGE_BYTES)                                                            \
			break;                                                                                              \
		n = next_part(w);                                                                                       \
		if (w->failed)                                                                                          \
			goto discard;                                                                                       \
		/* The verifier must see the bounds on the very registers that are used. */                             \
		asm volatile("if %[n] <= 4096 goto +1; %[n] = 4096;" : [n] "+r"(n));                                    \
		if (bpf_probe_read_kernel(piece->data + filled, n, (void *)w->from)) {                                  \
			w->failed = COPY_UNREADABLE;                                                                        \
			goto discard;                                                                                       \
		}                                                                                                       \
		*(volatile __u32 *)&w->filled = filled + n;                                                             \
		w->from += n;                                                                                           \
		w->here -= n;                                                                                           \
		w->in_bio -= n;                                                                                         \
		w->left -= n;                                                                                           \
	}                                                                                                           \
	filled = *(volatile __u32 *)&w->filled;                                                                     \
	if (!filled)                                                                                                \
		goto discard;                                                                                           \
	piece->record.sector = w->sector;                                                                           \
	piece->record.length = filled;                                                                              \
	piece->record.volume = w->volume;                                                                           \
	piece->record.kind = KIND_DATA;                                                                             \
	piece->record.lane = w->lane;                                                                               \
	piece->record.reserved = 0;                                                                                 \
	piece->record.flags = w->flags | (w->left ? 0 : RECORD_LAST);                                               \
	bpf_ringbuf_submit(piece, BPF_RB_NO_WAKEUP);                                                                \
	w->flags = 0;                                                                                               \
	w->sector += filled >> 9;                                                                                   \
	return 0;                                                                                                   \
discard:                                                                                                         \
	bpf_ringbuf_discard(piece, BPF_RB_NO_WAKEUP);                                                               \
	return w->failed != COPY_OK;                                                                                \
}

COPY_RECORD(copy_small, 4096, 1)
COPY_RECORD(copy_medium, 16384, 4)
COPY_RECORD(copy_large, 65536, 16)

/* The next record. Its size is fixed when it is reserved, so it is the largest that can be filled. */
static long copy_step(__u32 i, struct copying *c)
{
	struct walk *w = c->walk;

	if (!w->left)
		return 1;
	if (w->left >= 65536)
		return copy_large(w);
	if (w->left >= 16384)
		return copy_medium(w);
	return copy_small(w);
}

struct ranges {
	struct bio *bio;
	struct volume *volume;
	struct counters *here;
	__u32 lane, failed, any, left;
	__u8 kind, flags;
};

/* A discard may hold several bios, each a range of its own. */
static long range_step(__u32 i, struct ranges *w)
{
	struct bio *bio = w->bio;
	__u64 sector;
	__u32 size;
	struct record *record;

	if (!bio)
		return 1;
	sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
	size = BPF_CORE_READ(bio, bi_iter.bi_size);
	w->bio = BPF_CORE_READ(bio, bi_next);
	record = bpf_ringbuf_reserve(&ring, sizeof(*record), 0);
	if (!record) {
		w->failed = COPY_RING_FULL;
		return 1;
	}
	record->sector = sector;
	record->length = size;
	record->volume = w->volume->index;
	record->kind = w->kind;
	record->flags = w->flags | (w->bio ? 0 : RECORD_LAST);
	record->lane = w->lane;
	record->reserved = 0;
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	w->flags = 0;
	return 0;
}

static long range_test_step(__u32 i, struct ranges *w)
{
	struct bio *bio = w->bio;

	if (!bio)
		return 1;
	if (any_set(w->volume, BPF_CORE_READ(bio, bi_iter.bi_sector), BPF_CORE_READ(bio, bi_iter.bi_size))) {
		w->any = 1;
		return 1;
	}
	w->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

static long range_mark_step(__u32 i, struct ranges *w)
{
	struct bio *bio = w->bio;

	if (!bio)
		return 1;
	mark(w->volume, w->here, BPF_CORE_READ(bio, bi_iter.bi_sector), BPF_CORE_READ(bio, bi_iter.bi_size));
	w->bio = BPF_CORE_READ(bio, bi_next);
	return 0;
}

#define BIOS_MAX 512

static __always_inline int encrypted_inline(struct request *rq)
{
	struct request___inline_crypt *c = (void *)rq;

	return bpf_core_field_exists(c->crypt_ctx) && BPF_CORE_READ(c, crypt_ctx) != 0;
}

/* ---- the tracepoints ----
 *
 * R11: the kernel skips a program that is already running on the same CPU. A block event can come in a task, in a soft
 * interrupt on top of it and in a hard interrupt on top of that, and not deeper, so of three copies of the completion
 * program at least one is free. Each copy does its work only if no earlier one has. A skipped issue is only a missed
 * write, so there one program does.
 *
 * `handled` is cleared before a copy works and set to the request after; the last copy clears it. So when a copy finds its
 * own request there, an earlier copy has handled this very event, unless all earlier copies are busy below us.
 *
 * `busy` is kept like a stack: what an interrupt sets, it clears before we go on. So plain loads and stores do.
 */

#define COMPLETE_LAST 2

/* Statistics: an interrupt in between may cost one count. */
#define COUNT(x, n) STORE(x, LOAD(x) + (n))

enum { ADDRESS_ISSUE = 0, ADDRESS_REQUEUE = 1, ADDRESS_COMPLETE = 2 };

/* The verifier lets a pointer be stored and compared, but not computed with. */
static __always_inline __u64 address_of(struct request *rq, struct counters *here, __u32 program)
{
	*(volatile __u64 *)&here->address[program & 7] = (__u64)rq;
	return LOAD(here->address[program & 7]);
}

/* 1: this copy is to handle the event, which no earlier one has noted as `done`. */
static __always_inline int ours(__u64 address, struct counters *here, __u64 *done, __u32 copy)
{
	__u64 earlier = (1ULL << copy) - 1;

	if (copy && LOAD(*done) == address && (LOAD(here->complete_busy) & earlier) != earlier) {
		if (copy == COMPLETE_LAST)
			STORE(*done, 0);
		return 0;
	}
	return 1;
}

static __always_inline void issue(struct request *rq, __u64 address, struct volume *v, struct counters *here, __u32 op)
{
	__u32 zero = 0, bytes, failed = 0, cpu = bpf_get_smp_processor_id();
	struct control *c;
	struct bucket *b;
	struct bio *bio;
	struct slot slot;
	__u64 before;
	int trusted;

	c = bpf_map_lookup_elem(&control, &zero);
	b = bucket_of(address);
	if (!c || !b)
		return; /* missed: completion will not find it */

	bio = rq->bio;
	bytes = rq->__data_len;
	slot = slot_find(b, address);
	before = slot.value ? slot_reuse(slot, address) : 0;
	if (before) {
		/* Requeued: what is written now may not be what was captured, and more may have been merged to it. Or its
		 * last completion went unseen. Or this is the same event again. Marked before it is counted: what is counted
		 * is taken for dirty. */
		flight_mark(slot.flight, here);
		if (!(before & SLOT_REQUEUED))
			flight_ended(slot.flight, slot.flight->bytes);
		flight_note(slot.flight, v, rq, op, bytes);
		COUNT(here->missed_requeue, 1);
		if (op == REQ_OP_DRV_OUT)
			slot_free(slot.value);
		return;
	}
	if (op == REQ_OP_DRV_OUT) /* its completion needs no slot */
		return;
	trusted = LOAD(c->data_mode) && bio && bytes && (op == REQ_OP_WRITE || is_ranges(op)) && !encrypted_inline(rq);
	slot = slot_claim(b, address | (LOAD(c->phase) & SLOT_PHASE) | (trusted ? 0 : SLOT_MISSED));
	if (!slot.value) {
		COUNT(here->missed_slot, 1);
		return;
	}
	flight_note(slot.flight, v, rq, op, bytes);
	if (!trusted) {
		COUNT(here->missed_copy, 1);
		return;
	}
	if (is_ranges(op)) {
		struct ranges w = { .bio = bio, .volume = v };

		bpf_loop(BIOS_MAX, range_test_step, &w, 0);
		failed = w.any || w.bio;
	} else {
		failed = any_set(v, rq->__sector, bytes);
	}
	if (failed) {
		__sync_fetch_and_or(slot.value, SLOT_MISSED);
		COUNT(here->missed_dirty, 1);
		return;
	}

	if (is_ranges(op)) {
		struct ranges w = { .bio = bio, .volume = v, .flags = RECORD_FIRST };

		w.kind = op == REQ_OP_WRITE_ZEROES ? KIND_ZEROES : KIND_DISCARD;
		w.lane = cpu;
		bpf_loop(BIOS_MAX, range_step, &w, 0);
		failed = w.failed;
		COUNT(here->zero_writes, 1);
	} else {
		struct walk *w = bpf_map_lookup_elem(&walks, &cpu);
		struct copying copying = { .walk = w };

		if (w) {
			w->vmemmap = c->vmemmap;
			w->direct_map = c->direct_map;
			w->page_struct_shift = c->page_struct_shift & 63;
			w->page_shift = c->page_shift & 63;
			w->sector = rq->__sector;
			w->left = bytes;
			w->volume = v->index;
			w->lane = cpu;
			w->flags = RECORD_FIRST;
			w->failed = 0;
			w->here = 0;
			w->bio = (__u64)bio;
			w->vec = (__u64)bio->bi_io_vec + (__u64)bio->bi_iter.bi_idx * sizeof(struct bio_vec);
			w->done = bio->bi_iter.bi_bvec_done;
			w->in_bio = bio->bi_iter.bi_size;
			if (!copy_step(0, &copying) && w->left)
				bpf_loop(WALK_STEPS_MAX, copy_step, &copying, 0);
		}
		failed = !w || w->failed == COPY_UNREADABLE ? COPY_UNREADABLE :
			 w->failed ? COPY_RING_FULL : w->left ? COPY_UNREADABLE : COPY_OK;
		if (!failed) {
			COUNT(here->data_writes, 1);
			COUNT(here->data_bytes, bytes);
		}
	}
	if (failed) {
		__sync_fetch_and_or(slot.value, SLOT_MISSED);
		if (failed == COPY_RING_FULL)
			COUNT(here->missed_ring, 1);
		else
			COUNT(here->missed_copy, 1);
	}
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(on_issue, struct request *rq)
{
	__u32 op = rq->cmd_flags & 0xff;
	struct counters *here;
	struct volume *v;

	if (!(op & 1)) /* a read or a flush */
		return 0;
	v = volume_of(rq);
	if (!v)
		return 0;
	here = counters_here();
	if (here) /* else missed: completion will not find it */
		issue(rq, address_of(rq, here, ADDRESS_ISSUE), v, here, op);
	return 0;
}

/* A request goes back to be issued again: what was captured of it may not be what will be written. */
SEC("tp_btf/block_rq_requeue")
int BPF_PROG(on_requeue, struct request *rq)
{
	struct counters *here = counters_here();
	struct slot slot = {};
	struct bucket *b;
	__u64 address;

	if (!(rq->cmd_flags & 1) || !here || !volume_of(rq))
		return 0;
	address = address_of(rq, here, ADDRESS_REQUEUE);
	b = bucket_of(address);
	if (b)
		slot = slot_find(b, address);
	if (slot.value)
		__sync_fetch_and_or(slot.value, SLOT_MISSED | SLOT_REQUEUED);
	return 0;
}

static __always_inline void complete(struct request *rq, __u64 address, int error, unsigned int done,
				     struct volume *v, struct counters *here, __u32 op)
{
	__u32 bytes = rq->__data_len;
	struct slot slot = {};
	struct bucket *b;
	__u64 value = 0;

	if (op == REQ_OP_DRV_OUT) { /* R6: what a command from user space wrote, nobody can say */
		set_lost(v, here, LOST_PASSTHROUGH);
		return;
	}
	b = bucket_of(address);
	if (b)
		slot = slot_find(b, address);
	if (slot.value)
		value = LOAD(*slot.value);
	if (!bytes) { /* the end of a flush sequence; its data completed before */
		/* Its data's end was not seen, or that of what the request was used for before. Or its bios were taken away, to
		 * be written some other way: then too much is counted, which is noticed and mended when the disk is idle. */
		if (slot.value) {
			flight_mark(slot.flight, here);
			flight_ended(slot.flight, slot.flight->bytes);
			slot_free(slot.value);
		}
		return;
	}
	if (!slot.value || value & SLOT_MISSED || error) { /* R2: before anyone can see it complete */
		if (is_ranges(op)) {
			struct ranges w = { .bio = rq->bio, .volume = v, .here = here };

			bpf_loop(BIOS_MAX, range_mark_step, &w, 0);
			if (w.bio)
				set_lost(v, here, LOST_WALK);
		} else if (op == REQ_OP_WRITE) {
			mark(v, here, rq->__sector, bytes);
		} else {
			set_lost(v, here, LOST_OPERATION); /* a zone append or reset: its range is not in the request */
		}
		if (error)
			COUNT(here->failed, 1);
		if (!slot.value)
			COUNT(here->unseen, 1);
	}
	if (rq->bio)
		count_ended(v, done >> 9);
	if (!slot.value)
		return;
	if (done >= bytes || error) {
		slot_free(slot.value);
	} else if (slot.flight->sector == rq->__sector) { /* the rest goes on; not when this event was handled before */
		slot.flight->sector += done >> 9;
		if (slot.flight->bytes > done)
			slot.flight->bytes -= done;
	}
}

static __always_inline int complete_copy(struct request *rq, int error, unsigned int done, __u32 copy)
{
	__u64 others = 7 & ~(1ULL << copy), address;
	__u32 op = rq->cmd_flags & 0xff;
	struct counters *here;
	struct volume *v;

	if (!(op & 1))
		return 0;
	here = counters_here();
	if (!here) {
		v = volume_of(rq);
		if (v)
			set_lost(v, here, LOST_WALK);
		return 0;
	}
	address = address_of(rq, here, ADDRESS_COMPLETE + copy);
	if (!ours(address, here, &here->complete_handled, copy) || !ours(address, here, &here->complete_passed, copy))
		return 0;
	v = volume_of(rq);
	if (!v) { /* apart from the other word, which an interrupt with such a request would spoil */
		STORE(here->complete_passed, address);
		return 0;
	}
	STORE(here->complete_handled, 0);
	if ((LOAD(here->complete_busy) & others) == others)
		COUNT(here->deep, 1);
	STORE(here->complete_busy, LOAD(here->complete_busy) | 1ULL << copy);
	complete(rq, address, error, done, v, here, op);
	if (copy)
		COUNT(here->rescued, 1);
	STORE(here->complete_busy, LOAD(here->complete_busy) & ~(1ULL << copy));
	STORE(here->complete_handled, copy == COMPLETE_LAST ? 0 : address);
	return 0;
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(on_complete_0, struct request *rq, int error, unsigned int done)
{
	return complete_copy(rq, error, done, 0);
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(on_complete_1, struct request *rq, int error, unsigned int done)
{
	return complete_copy(rq, error, done, 1);
}

SEC("tp_btf/block_rq_complete")
int BPF_PROG(on_complete_2, struct request *rq, int error, unsigned int done)
{
	return complete_copy(rq, error, done, 2);
}

/* ---- writes whose end nobody saw ----
 *
 * Run by user space alone. A slot is stale when its request does something else now, or is free.
 */

struct looking {
	struct counters *here;
};

static long look_at_suspect(__u32 i, struct looking *looking)
{
	struct suspect *s = bpf_map_lookup_elem(&suspects, &i);
	struct request *rq;
	struct flight flight;
	struct gendisk *disk;
	struct volume *v;
	struct bucket *b;
	__u32 key, place, bytes;
	__u64 value, sector;
	int references;

	if (!s || !s->value)
		return 1;
	s->stale = 0;
	key = s->place >> 3;
	place = s->place & 7;
	b = bpf_map_lookup_elem(&inflight, &key);
	value = s->value;
	if (!b || LOAD(b->slot[place]) != value)
		return 0;
	flight = b->flight[place];
	rq = (struct request *)(value & ~SLOT_FLAGS);
	disk = BPF_CORE_READ(rq, q, disk);
	bytes = flight.bytes;
	if (bpf_core_read(&references, sizeof(references), &rq->ref))
		return 0;
	if (references && BPF_CORE_READ(rq, cmd_flags) & 1 &&
	    ((__u32)BPF_CORE_READ(disk, major) << 20 | (__u32)BPF_CORE_READ(disk, first_minor)) == flight.dev) {
		sector = BPF_CORE_READ(rq, __sector);
		/* Without data left, its data has ended and the disk's cache is being flushed, which may take long. */
		if (sector == flight.sector && BPF_CORE_READ(rq, __data_len)) {
			__sync_fetch_and_and(&b->slot[place], ~SLOT_DOUBTED);
			return 0;
		}
		if (sector > flight.sector && sector - flight.sector < bytes >> 9) /* only a part of it has ended */
			bytes = (sector - flight.sector) << 9;
	}
	if (!s->mend) {
		s->stale = __sync_val_compare_and_swap(&b->slot[place], value, value | SLOT_DOUBTED) == value;
	} else if (value & SLOT_DOUBTED && __sync_val_compare_and_swap(&b->slot[place], value, 0) == value) {
		/* Nobody has used the slot since all programs had ended: `flight` is what it was noted for. */
		s->stale = 1;
		flight_mark(&flight, looking->here);
		flight_ended(&flight, bytes);
	}
	v = bpf_map_lookup_elem(&volumes, &flight.dev);
	s->volume = v ? v->index : VOLUMES_MAX;
	s->sectors = bytes >> 9;
	return 0;
}

SEC("raw_tp/block_rq_complete")
int on_suspects(void *ctx)
{
	struct looking looking = { .here = counters_here() };

	if (looking.here)
		bpf_loop(SUSPECTS_MAX, look_at_suspect, &looking, 0);
	return 0;
}

/* ---- calibration: where page frames are, without a kernel symbol ---- */

struct base_search {
	struct calibration *c;
	__u64 from; /* an address in the direct map, rounded down to 1 GiB */
};

static long try_base(__u32 i, struct base_search *s)
{
	struct calibration *c = s->c;
	__u64 base = s->from - ((__u64)i << 30), seen[2];

	if (bpf_probe_read_kernel(seen, sizeof(seen), (void *)(base + (c->pfn << (c->page_shift & 63)))))
		return 0;
	if (seen[0] != c->magic[0] || seen[1] != c->magic[1])
		return 0;
	c->direct_map = base;
	c->found = 1;
	return 1;
}

SEC("tp_btf/block_rq_issue")
int BPF_PROG(on_calibrate, struct request *rq)
{
	__u32 zero = 0;
	struct calibration *c = bpf_map_lookup_elem(&calibration, &zero);
	struct bio *bio = BPF_CORE_READ(rq, bio);
	struct bio_vec vec;

	if (!c || c->page || !bio || (BPF_CORE_READ(rq, cmd_flags) & 0xff) != REQ_OP_READ)
		return 0;
	if (BPF_CORE_READ(rq, __sector) != c->sector || device_of(rq) != c->dev)
		return 0;
	if (bpf_probe_read_kernel(&vec, sizeof(vec), BPF_CORE_READ(bio, bi_io_vec) + BPF_CORE_READ(bio, bi_iter.bi_idx)))
		return 0;
	c->page = (__u64)vec.bv_page;
	c->page_offset = vec.bv_offset + BPF_CORE_READ(bio, bi_iter.bi_bvec_done);
	c->page_struct_bytes = bpf_core_type_size(struct page);
	if (c->direct_map) {
		__u64 seen[2] = {};

		bpf_probe_read_kernel(seen, sizeof(seen), (void *)(c->direct_map + (c->pfn << (c->page_shift & 63))));
		c->found = seen[0] == c->magic[0] && seen[1] == c->magic[1];
	} else {
		/* Requests are in the direct map, so its base is at or below this one: with four-level page tables and with
		 * five, whose direct map begins elsewhere. */
		struct base_search s = { .c = c };

		*(volatile __u64 *)&c->request = (__u64)rq;
		s.from = *(volatile __u64 *)&c->request >> 30 << 30;
		bpf_loop(1 << 18, try_base, &s, 0);
	}
	return 0;
}
