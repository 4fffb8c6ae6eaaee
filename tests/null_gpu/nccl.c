// NCCL for ranks of one machine, through shared memory: collectives are done when their call returns, sums in the order
// of the ranks. What no training step of ours calls (sending to one rank, say) is not here: build.py makes it return 0.
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PIECE (1L << 20) // bytes of a rank that are exchanged at a time
#define RETURN(place, value) return *(place) = (value), 0

typedef struct { char text[128]; } Id;
typedef struct { int arrived, turn; } Meeting;
typedef struct { char name[200]; int rank, ranks, splits; Meeting *meeting; char *pieces; } Comm;
enum { INT8, UINT8, INT32, UINT32, INT64, UINT64, FLOAT16, FLOAT32, FLOAT64, BFLOAT16 };
enum { SUM, PRODUCT, MAX, MIN, AVERAGE };

static void meet(Comm *comm) {
  Meeting *meeting = comm->meeting;
  int turn = __atomic_load_n(&meeting->turn, __ATOMIC_ACQUIRE);
  if (__atomic_add_fetch(&meeting->arrived, 1, __ATOMIC_ACQ_REL) == comm->ranks) {
    __atomic_store_n(&meeting->arrived, 0, __ATOMIC_RELEASE);
    __atomic_add_fetch(&meeting->turn, 1, __ATOMIC_ACQ_REL);
  } else
    while (__atomic_load_n(&meeting->turn, __ATOMIC_ACQUIRE) == turn) usleep(50);
}

static Comm *join(const char *name, int rank, int ranks) {
  Comm *comm = calloc(1, sizeof *comm);
  snprintf(comm->name, sizeof comm->name, "%s", name);
  comm->rank = rank, comm->ranks = ranks;
  size_t size = 4096 + ranks * PIECE;
  int file = shm_open(name, O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, size)) abort();
  char *start = mmap(0, size, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (start == MAP_FAILED) abort();
  comm->meeting = (Meeting *)start, comm->pieces = start + 4096;
  meet(comm);
  if (rank == 0) shm_unlink(name);
  return comm;
}

int ncclGetVersion(int *version) { RETURN(version, 22809); }
int ncclGetUniqueId(Id *id) {
  unsigned long number = 0;
  if (getentropy(&number, sizeof number)) abort();
  memset(id, 0, sizeof *id);
  return snprintf(id->text, sizeof id->text, "/null_nccl_%lx", number), 0;
}
int ncclCommInitRankConfig(Comm **comm, int ranks, Id id, int rank, void *config) { RETURN(comm, join(id.text, rank, ranks)); }
int ncclCommInitRank(Comm **comm, int ranks, Id id, int rank) { RETURN(comm, join(id.text, rank, ranks)); }
int ncclCommCount(Comm *comm, int *count) { RETURN(count, comm->ranks); }
int ncclCommUserRank(Comm *comm, int *rank) { RETURN(rank, comm->rank); }
int ncclCommGetAsyncError(Comm *comm, int *error) { RETURN(error, 0); }
const char *ncclGetErrorString(int error) { return "error of the null GPU"; }
const char *ncclGetLastError(Comm *comm) { return "error of the null GPU"; }

static char *piece(Comm *comm, int rank) { return comm->pieces + rank * PIECE; }
static size_t size_of(int type) { return (size_t[]){1, 1, 4, 4, 8, 8, 2, 4, 8, 2}[type]; }
static long least(long a, long b) { return a < b ? a : b; }

int ncclCommSplit(Comm *comm, int color, int key, Comm **made, void *config) {
  int own[2] = {color, key}, rank = 0, ranks = 0;
  memcpy(piece(comm, comm->rank), own, sizeof own);
  meet(comm);
  for (int other = 0; other < comm->ranks; other++) {
    int *theirs = (int *)piece(comm, other);
    if (theirs[0] != color) continue;
    ranks++, rank += theirs[1] < key || (theirs[1] == key && other < comm->rank);
  }
  meet(comm);
  char name[200];
  snprintf(name, sizeof name, "%.150s_%d_%d", comm->name, comm->splits++, color);
  *made = color < 0 ? 0 : join(name, rank, ranks);
  return 0;
}

static double read_one(const char *from, long i, int type) {
  switch (type) {
  case INT8: return ((int8_t *)from)[i];
  case UINT8: return ((uint8_t *)from)[i];
  case INT32: return ((int32_t *)from)[i];
  case UINT32: return ((uint32_t *)from)[i];
  case INT64: return ((int64_t *)from)[i];
  case UINT64: return ((uint64_t *)from)[i];
  case FLOAT16: return ((_Float16 *)from)[i];
  case FLOAT32: return ((float *)from)[i];
  case FLOAT64: return ((double *)from)[i];
  case BFLOAT16: {
    uint32_t bits = (uint32_t)((uint16_t *)from)[i] << 16;
    float value;
    return memcpy(&value, &bits, 4), value;
  }
  default: abort();
  }
}

static void write_one(char *to, long i, int type, double value) {
  switch (type) {
  case INT8: ((int8_t *)to)[i] = value; break;
  case UINT8: ((uint8_t *)to)[i] = value; break;
  case INT32: ((int32_t *)to)[i] = value; break;
  case UINT32: ((uint32_t *)to)[i] = value; break;
  case INT64: ((int64_t *)to)[i] = value; break;
  case UINT64: ((uint64_t *)to)[i] = value; break;
  case FLOAT16: ((_Float16 *)to)[i] = value; break;
  case FLOAT32: ((float *)to)[i] = value; break;
  case FLOAT64: ((double *)to)[i] = value; break;
  case BFLOAT16: {
    float rounded = value;
    uint32_t bits;
    memcpy(&bits, &rounded, 4);
    ((uint16_t *)to)[i] = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  }
}

// Reduce `count` numbers at `offset` bytes of every rank's piece.
static void reduce(Comm *comm, char *to, long offset, long count, int type, int op) {
  for (long i = 0; i < count; i++) {
    double result = read_one(piece(comm, 0) + offset, i, type);
    for (int rank = 1; rank < comm->ranks; rank++) {
      double other = read_one(piece(comm, rank) + offset, i, type);
      result = op == MAX ? (other > result ? other : result) : op == MIN ? (other < result ? other : result)
             : op == PRODUCT ? result * other : result + other;
    }
    write_one(to, i, type, op == AVERAGE ? result / comm->ranks : result);
  }
}

static int reduced(const char *from, char *to, long count, int type, int op, int root, Comm *comm) {
  if (op > AVERAGE) abort();
  long most = PIECE / size_of(type);
  for (long done = 0; done < count; done += most) {
    long now = least(most, count - done), place = done * size_of(type);
    memcpy(piece(comm, comm->rank), from + place, now * size_of(type));
    meet(comm);
    if (root < 0 || root == comm->rank) reduce(comm, to + place, 0, now, type, op);
    meet(comm);
  }
  return 0;
}
int ncclAllReduce(const char *from, char *to, size_t count, int type, int op, Comm *comm, void *stream) {
  return reduced(from, to, count, type, op, -1, comm);
}
int ncclReduce(const char *from, char *to, size_t count, int type, int op, int root, Comm *comm, void *stream) {
  return reduced(from, to, count, type, op, root, comm);
}

int ncclReduceScatter(const char *from, char *to, size_t count, int type, int op, Comm *comm, void *stream) {
  if (op > AVERAGE) abort();
  long most = PIECE / comm->ranks / 16 * 16 / size_of(type), own = most * size_of(type);
  for (long done = 0; done < (long)count; done += most) {
    long now = least(most, count - done), place = done * size_of(type);
    for (int rank = 0; rank < comm->ranks; rank++)
      memcpy(piece(comm, comm->rank) + rank * own, from + rank * count * size_of(type) + place, now * size_of(type));
    meet(comm);
    reduce(comm, to + place, comm->rank * own, now, type, op);
    meet(comm);
  }
  return 0;
}

int ncclAllGather(const char *from, char *to, size_t count, int type, Comm *comm, void *stream) {
  long size = count * size_of(type);
  for (long done = 0; done < size; done += PIECE) {
    long now = least(PIECE, size - done);
    memcpy(piece(comm, comm->rank), from + done, now);
    meet(comm);
    for (int rank = 0; rank < comm->ranks; rank++) memcpy(to + rank * size + done, piece(comm, rank), now);
    meet(comm);
  }
  return 0;
}

int ncclBroadcast(const char *from, char *to, size_t count, int type, int root, Comm *comm, void *stream) {
  long size = count * size_of(type);
  for (long done = 0; done < size; done += PIECE) {
    long now = least(PIECE, size - done);
    if (comm->rank == root) memcpy(piece(comm, root), from + done, now);
    meet(comm);
    memcpy(to + done, piece(comm, root), now);
    meet(comm);
  }
  return 0;
}
int ncclBcast(char *data, size_t count, int type, int root, Comm *comm, void *stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}
