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
#define CPUS_MAX 1024
#define PIECE_BYTES 4096
#define BUCKETS 8192        /* of 8 requests each: 65,536 requests in flight */
#define WALK_STEPS_MAX 8192 /* bios and pages of one request */
#define RANGE_WORDS_MAX 2048 /* bitmap words of one request: 8 GiB */

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

struct piece {
	struct record record;
	__u8 data[PIECE_BYTES];
};

struct volume {
	__u64 first_word; /* of this volume's bits in `granules` */
	__u64 granules;
	__u32 index;
	__u32 reserved;
};

struct granule_word {
	__u64 dirty;
	__u64 draining;
};

struct control {
	__u64 phase;       /* 0 or 1: which in-flight counter new writes join */
	__u64 data_mode;   /* 0: bitmap only */
	__u64 vmemmap;     /* address of the first struct page */
	__u64 direct_map;  /* address of page frame 0 */
	__u64 page_struct_shift;
	__u64 page_shift;
};

struct counters { /* one a CPU, 256 bytes, written by that CPU only */
	__u64 begun[2];      /* captured writes issued, by phase */
	__u64 ended[2];      /* and completed */
	__u64 marked;        /* granules that became dirty; counted before the bit is set, so never too low */
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
	__u64 issue_handled;    /* the request whose issue a copy of the program has just handled */
	__u64 complete_handled; /* and whose completion */
	__u64 rescued;          /* events that a later copy handled because an earlier one was already running */
	__u64 reserved[13];
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
};

enum { LOST_PASSTHROUGH = 1, LOST_RANGE = 2, LOST_WALK = 4, LOST_OPERATION = 8 };

struct { __uint(type, BPF_MAP_TYPE_RINGBUF); __uint(max_entries, 1 << 20); } ring SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_HASH); __uint(max_entries, VOLUMES_MAX); __type(key, __u32); __type(value, struct volume); } volumes SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct granule_word); } granules SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, VOLUMES_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, __u64); } lost SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct control); } control SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, CPUS_MAX); __uint(map_flags, BPF_F_MMAPABLE); __type(key, __u32); __type(value, struct counters); } counters SEC(".maps");
struct bucket { __u64 slot[8]; };
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, BUCKETS); __type(key, __u32); __type(value, struct bucket); } inflight SEC(".maps");
struct { __uint(type, BPF_MAP_TYPE_ARRAY); __uint(max_entries, 1); __type(key, __u32); __type(value, struct calibration); } calibration SEC(".maps");

/* ---- which disk ---- */

static __always_inline __u32 device_of(struct request *rq)
{
	struct gendisk *disk;
	struct request_queue *q = BPF_CORE_READ(rq, q);

	if (bpf_core_field_exists(q->disk)) {
		disk = BPF_CORE_READ(q, disk);
	} else {
		struct request___before_5_17 *old = (void *)rq;
		disk = BPF_CORE_READ(old, rq_disk);
	}
	if (!disk)
		return 0;
	return (__u32)BPF_CORE_READ(disk, major) << 20 | (__u32)BPF_CORE_READ(disk, first_minor);
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
	/* Counted first, corrected after: a reader of the count may see too many, never too few. */
	__sync_fetch_and_add(&r->here->marked, popcount(mask));
	before = __sync_fetch_and_or(&bits->dirty, mask);
	if (before & mask)
		__sync_fetch_and_add(&r->here->marked, -popcount(before & mask));
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

/* ---- requests in flight ---- */

#define SLOT_PHASE 1ULL
#define SLOT_MISSED 2ULL
#define SLOT_FLAGS 7ULL

static __always_inline struct bucket *bucket_of(struct request *rq)
{
	__u32 key = ((__u64)rq >> 6) * 0x9e3779b97f4a7c15ULL >> 40 & (BUCKETS - 1);

	return bpf_map_lookup_elem(&inflight, &key);
}

static __always_inline __u64 *slot_find(struct bucket *b, struct request *rq)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		if ((*(volatile __u64 *)&b->slot[i] & ~SLOT_FLAGS) == (__u64)rq)
			return &b->slot[i];
	return 0;
}

static __always_inline __u64 *slot_claim(struct bucket *b, __u64 value)
{
#pragma unroll
	for (int i = 0; i < 8; i++)
		if (!*(volatile __u64 *)&b->slot[i] && __sync_val_compare_and_swap(&b->slot[i], 0, value) == 0)
			return &b->slot[i];
	return 0;
}

/* ---- copying ---- */

enum { COPY_OK = 0, COPY_RING_FULL = 1, COPY_UNREADABLE = 2 };

struct walk {
	struct bio *bio;
	struct bio_vec *vec;
	__u64 vmemmap, direct_map, sector;
	__u32 page_struct_shift, page_shift;
	__u32 index, done; /* in the bio's vector */
	__u32 in_bio;      /* bytes left in this bio */
	__u32 left;        /* bytes left in the request */
	__u32 lane;
	__u16 volume;
	__u8 flags, failed;
};

static __always_inline void enter_bio(struct walk *w, struct bio *bio)
{
	w->bio = bio;
	w->vec = BPF_CORE_READ(bio, bi_io_vec);
	w->index = BPF_CORE_READ(bio, bi_iter.bi_idx);
	w->done = BPF_CORE_READ(bio, bi_iter.bi_bvec_done);
	w->in_bio = BPF_CORE_READ(bio, bi_iter.bi_size);
	w->sector = BPF_CORE_READ(bio, bi_iter.bi_sector);
}

/* One step: on to the next bio, to the next page, or one piece of at most PIECE_BYTES into the ring. */
static long copy_step(__u32 i, struct walk *w)
{
	struct bio_vec vec;
	struct piece *piece;
	__u32 n;
	__u64 from;

	if (!w->left)
		return 1;
	if (!w->in_bio) {
		/* Not BPF_CORE_READ(w->bio, ...): that would relocate `walk` too, which the kernel does not have. */
		struct bio *next = w->bio;

		next = BPF_CORE_READ(next, bi_next);
		if (!next) {
			w->failed = COPY_UNREADABLE;
			return 1;
		}
		enter_bio(w, next);
		return 0;
	}
	if (bpf_probe_read_kernel(&vec, sizeof(vec), w->vec + w->index)) {
		w->failed = COPY_UNREADABLE;
		return 1;
	}
	if (w->done >= vec.bv_len) {
		w->index++;
		w->done = 0;
		return 0;
	}
	n = vec.bv_len - w->done;
	if (n > w->in_bio)
		n = w->in_bio;
	if (n > w->left)
		n = w->left;
	if (n > PIECE_BYTES)
		n = PIECE_BYTES;
	if (n & 511) { /* a page boundary inside a sector: no sector of it could be recorded whole */
		w->failed = COPY_UNREADABLE;
		return 1;
	}
	piece = bpf_ringbuf_reserve(&ring, sizeof(*piece), 0);
	if (!piece) {
		w->failed = COPY_RING_FULL;
		return 1;
	}
	from = (((__u64)vec.bv_page - w->vmemmap) >> w->page_struct_shift << w->page_shift) + w->direct_map +
	       vec.bv_offset + w->done;
	piece->record.sector = w->sector;
	piece->record.length = n;
	piece->record.volume = w->volume;
	piece->record.kind = KIND_DATA;
	piece->record.lane = w->lane;
	piece->record.reserved = 0;
	piece->record.flags = w->flags | (n == w->left ? RECORD_LAST : 0);
	/* The verifier must see the bound on the very register that is passed. */
	asm volatile("if %[n] <= 4096 goto +1; %[n] = 4096;" : [n] "+r"(n));
	if (bpf_probe_read_kernel(piece->data, n, (void *)from)) {
		w->failed = COPY_UNREADABLE;
		bpf_ringbuf_discard(piece, BPF_RB_NO_WAKEUP);
		return 1;
	}
	bpf_ringbuf_submit(piece, BPF_RB_NO_WAKEUP);
	w->flags = 0;
	w->done += n;
	w->in_bio -= n;
	w->left -= n;
	w->sector += n >> 9;
	return 0;
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

static __always_inline int is_ranges(__u32 op)
{
	return op == REQ_OP_DISCARD || op == REQ_OP_SECURE_ERASE || op == REQ_OP_WRITE_ZEROES;
}

static __always_inline int encrypted_inline(struct request *rq)
{
	struct request___inline_crypt *c = (void *)rq;

	return bpf_core_field_exists(c->crypt_ctx) && BPF_CORE_READ(c, crypt_ctx) != 0;
}

/* ---- the two tracepoints ----
 *
 * R11: the kernel skips a program that is already running on the same CPU. A block event can come in a task, in a soft
 * interrupt on top of it and in a hard interrupt on top of that, so of three copies at least one is free. Each copy does
 * its work only if no earlier one has. A skipped issue is only a missed write, so two copies do there.
 *
 * `handled` is cleared before a copy works and set to the request after; the last copy clears it. So when a copy finds its
 * own request there, an earlier copy has handled this very event: no event of the same request can lie in between.
 */

#define LANES_PER_CPU 2

static __always_inline void issue(struct request *rq, __u32 copy, struct volume *v, struct counters *here, __u32 op)
{
	__u32 zero = 0, bytes, failed = 0;
	struct control *c;
	struct bucket *b;
	struct bio *bio;
	__u64 phase, *slot;

	c = bpf_map_lookup_elem(&control, &zero);
	b = bucket_of(rq);
	bio = BPF_CORE_READ(rq, bio);
	bytes = BPF_CORE_READ(rq, __data_len);
	if (!c || !b)
		return; /* missed: completion will not find it */

	/* R4: join the in-flight count before looking at the granules, so that whoever saw the bit set and then
	 * waited for the count to drain knows that no captured write is left that did not see it. */
	phase = *(volatile __u64 *)&c->phase & 1;
	__sync_fetch_and_add(&here->begun[phase & 1], 1);

	slot = slot_find(b, rq);
	if (slot) { /* requeued (its first data may not be what is written now), or its completion went unseen */
		__sync_fetch_and_or(slot, SLOT_MISSED);
		__sync_fetch_and_add(&here->missed_requeue, 1);
		__sync_fetch_and_add(&here->ended[phase & 1], 1);
		return;
	}
	if (!*(volatile __u64 *)&c->data_mode || !bio || !bytes ||
	    !(op == REQ_OP_WRITE || is_ranges(op)) || encrypted_inline(rq)) {
		__sync_fetch_and_add(&here->missed_copy, 1);
		__sync_fetch_and_add(&here->ended[phase & 1], 1);
		return;
	}
	if (is_ranges(op)) {
		struct ranges w = { .bio = bio, .volume = v };

		bpf_loop(BIOS_MAX, range_test_step, &w, 0);
		failed = w.any || w.bio;
	} else {
		failed = any_set(v, BPF_CORE_READ(rq, __sector), bytes);
	}
	if (failed) {
		__sync_fetch_and_add(&here->missed_dirty, 1);
		__sync_fetch_and_add(&here->ended[phase & 1], 1);
		return;
	}
	slot = slot_claim(b, (__u64)rq | phase);
	if (!slot) {
		__sync_fetch_and_add(&here->missed_slot, 1);
		__sync_fetch_and_add(&here->ended[phase & 1], 1);
		return;
	}

	if (is_ranges(op)) {
		struct ranges w = { .bio = bio, .volume = v, .flags = RECORD_FIRST };

		w.kind = op == REQ_OP_WRITE_ZEROES ? KIND_ZEROES : KIND_DISCARD;
		w.lane = bpf_get_smp_processor_id() * LANES_PER_CPU + copy;
		bpf_loop(BIOS_MAX, range_step, &w, 0);
		failed = w.failed;
		__sync_fetch_and_add(&here->zero_writes, 1);
	} else {
		struct walk w = { .flags = RECORD_FIRST };

		w.vmemmap = c->vmemmap;
		w.direct_map = c->direct_map;
		w.page_struct_shift = c->page_struct_shift & 63;
		w.page_shift = c->page_shift & 63;
		w.left = bytes;
		w.volume = v->index;
		w.lane = bpf_get_smp_processor_id() * LANES_PER_CPU + copy;
		enter_bio(&w, bio);
		bpf_loop(WALK_STEPS_MAX, copy_step, &w, 0);
		failed = w.failed ? w.failed : w.left ? COPY_UNREADABLE : COPY_OK;
		if (!failed) {
			__sync_fetch_and_add(&here->data_writes, 1);
			__sync_fetch_and_add(&here->data_bytes, bytes);
		}
	}
	if (failed) {
		__sync_fetch_and_or(slot, SLOT_MISSED);
		__sync_fetch_and_add(failed == COPY_RING_FULL ? &here->missed_ring : &here->missed_copy, 1);
	}
}

static __always_inline int issue_copy(struct request *rq, __u32 copy)
{
	struct counters *here = counters_here();
	struct volume *v;
	__u32 op;

	if (!here)
		return 0; /* a CPU past CPUS_MAX: missed, completion will not find it */
	if (!copy || *(volatile __u64 *)&here->issue_handled != (__u64)rq) {
		*(volatile __u64 *)&here->issue_handled = 0;
		op = BPF_CORE_READ(rq, cmd_flags) & 0xff;
		if (op & 1 && (v = volume_of(rq))) { /* not a read or flush, and ours */
			issue(rq, copy, v, here, op);
			if (copy)
				__sync_fetch_and_add(&here->rescued, 1);
		}
		*(volatile __u64 *)&here->issue_handled = (__u64)rq;
	}
	if (copy == 1)
		*(volatile __u64 *)&here->issue_handled = 0;
	return 0;
}

SEC("raw_tp/block_rq_issue")
int BPF_PROG(on_issue_0, struct request *rq)
{
	return issue_copy(rq, 0);
}

SEC("raw_tp/block_rq_issue")
int BPF_PROG(on_issue_1, struct request *rq)
{
	return issue_copy(rq, 1);
}

static __always_inline void complete(struct request *rq, int error, unsigned int done, struct volume *v,
				     struct counters *here, __u32 op)
{
	struct bucket *b;
	__u64 *slot = 0, value = 0;
	__u32 bytes;
	int missed;

	bytes = BPF_CORE_READ(rq, __data_len);
	if (op == REQ_OP_DRV_OUT) { /* R6: what a command from user space wrote, nobody can say */
		set_lost(v, here, LOST_PASSTHROUGH);
		return;
	}
	if (!bytes) /* the end of a flush sequence; its data completed before */
		return;
	b = bucket_of(rq);
	if (b)
		slot = slot_find(b, rq);
	if (slot)
		value = *(volatile __u64 *)slot;
	missed = !slot || value & SLOT_MISSED || error;
	if (missed) { /* R2: before anyone can see it complete */
		if (!here) {
			set_lost(v, here, LOST_WALK);
		} else if (is_ranges(op)) {
			struct ranges w = { .bio = BPF_CORE_READ(rq, bio), .volume = v, .here = here };

			bpf_loop(BIOS_MAX, range_mark_step, &w, 0);
			if (w.bio)
				set_lost(v, here, LOST_WALK);
		} else if (op == REQ_OP_WRITE) {
			mark(v, here, BPF_CORE_READ(rq, __sector), bytes);
		} else {
			set_lost(v, here, LOST_OPERATION); /* a zone append or reset: its range is not in the request */
		}
		if (here && error)
			__sync_fetch_and_add(&here->failed, 1);
		if (here && !slot)
			__sync_fetch_and_add(&here->unseen, 1);
	}
	if (slot && here && (done >= bytes || error)) {
		/* Free the slot before leaving the count: whoever sees the count drained sees no slot. */
		__sync_lock_test_and_set(slot, 0);
		__sync_fetch_and_add(&here->ended[value & SLOT_PHASE], 1);
	}
}

static __always_inline int complete_copy(struct request *rq, int error, unsigned int done, __u32 copy)
{
	struct counters *here = counters_here();
	struct volume *v;
	__u32 op;

	if (copy && here && *(volatile __u64 *)&here->complete_handled == (__u64)rq)
		goto handled;
	if (here)
		*(volatile __u64 *)&here->complete_handled = 0;
	op = BPF_CORE_READ(rq, cmd_flags) & 0xff;
	if (op & 1 && (v = volume_of(rq))) {
		complete(rq, error, done, v, here, op);
		if (copy && here)
			__sync_fetch_and_add(&here->rescued, 1);
	}
	if (here)
		*(volatile __u64 *)&here->complete_handled = (__u64)rq;
handled:
	if (copy == 2 && here)
		*(volatile __u64 *)&here->complete_handled = 0;
	return 0;
}

SEC("raw_tp/block_rq_complete")
int BPF_PROG(on_complete_0, struct request *rq, int error, unsigned int done)
{
	return complete_copy(rq, error, done, 0);
}

SEC("raw_tp/block_rq_complete")
int BPF_PROG(on_complete_1, struct request *rq, int error, unsigned int done)
{
	return complete_copy(rq, error, done, 1);
}

SEC("raw_tp/block_rq_complete")
int BPF_PROG(on_complete_2, struct request *rq, int error, unsigned int done)
{
	return complete_copy(rq, error, done, 2);
}

/* ---- calibration: where page frames are, without a kernel symbol ---- */

static long try_base(__u32 i, struct calibration **context)
{
	struct calibration *c = *context;
	__u64 base = 0xffff000000000000ULL + ((__u64)i << 30), seen[2];

	if (bpf_probe_read_kernel(seen, sizeof(seen), (void *)(base + (c->pfn << (c->page_shift & 63)))))
		return 0;
	if (seen[0] != c->magic[0] || seen[1] != c->magic[1])
		return 0;
	c->direct_map = base;
	c->found = 1;
	return 1;
}

SEC("raw_tp/block_rq_issue")
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
		bpf_loop(1 << 18, try_base, &c, 0);
	}
	return 0;
}
