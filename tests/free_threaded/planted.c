/* A race that ThreadSanitizer must report, or its silence means nothing. */
#include <pthread.h>
#include <stddef.h>

static long planted;

static void *
planted_writer(void *unused)
{
    (void)unused;
    for (int i = 0; i < 100000; i++) {
        planted++;
    }
    return NULL;
}

int
planted_race(void)
{
    pthread_t one, other;
    if (pthread_create(&one, NULL, planted_writer, NULL) != 0) {
        return -1;
    }
    if (pthread_create(&other, NULL, planted_writer, NULL) != 0) {
        pthread_join(one, NULL);
        return -1;
    }
    return pthread_join(one, NULL) | pthread_join(other, NULL);
}
