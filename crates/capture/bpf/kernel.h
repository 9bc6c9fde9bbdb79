/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kernel's structures, as far as the capture program reads them. Offsets are not these: the loader takes them from
 * the running kernel's BTF (CO-RE). Facts from include/linux/{blk-mq,blk_types,bvec,blkdev}.h.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef signed char __s8;
typedef short __s16;
typedef int __s32;
typedef long long __s64;
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;
typedef _Bool bool;

enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	BPF_MAP_TYPE_RINGBUF = 27,
	BPF_F_MMAPABLE = 1024,
	BPF_RB_NO_WAKEUP = 1,
};

/* Stable since 4.x; odd operations write. */
enum {
	REQ_OP_READ = 0,
	REQ_OP_WRITE = 1,
	REQ_OP_DISCARD = 3,
	REQ_OP_SECURE_ERASE = 5,
	REQ_OP_WRITE_ZEROES = 9,
	REQ_OP_DRV_OUT = 35,
};

#define CORE __attribute__((preserve_access_index))

struct page {
	unsigned long flags;
} CORE;

struct bio_vec { /* read whole: its layout has been this since 5.1 */
	struct page *bv_page;
	unsigned int bv_len;
	unsigned int bv_offset;
};

struct bvec_iter {
	__u64 bi_sector;
	unsigned int bi_size;
	unsigned int bi_idx;
	unsigned int bi_bvec_done;
} CORE;

struct bio {
	struct bio *bi_next;
	struct bvec_iter bi_iter;
	struct bio_vec *bi_io_vec;
} CORE;

struct gendisk {
	int major;
	int first_minor;
} CORE;

struct request_queue {
	struct gendisk *disk; /* since 5.15 */
} CORE;

typedef struct {
	int counter;
} atomic_t;

struct request {
	atomic_t ref; /* 0: free */
	struct request_queue *q;
	unsigned int cmd_flags;
	unsigned int __data_len;
	__u64 __sector;
	struct bio *bio;
} CORE;

struct request___inline_crypt { /* with CONFIG_BLK_INLINE_ENCRYPTION */
	void *crypt_ctx;
} CORE;
